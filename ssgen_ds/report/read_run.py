"""A run folder, read for its report: recipe, environment, steps, samples, evaluations and gap. No weights are touched.

A line of selfgen/samples.jsonl is one example as it was trained on:

    {"round": 1, "step": 1, "example_id": "a1", "prompt": "...", "gold": "...",
     "mixed": [["text", is_sampled], ...] | null, "draft": str | null, "draft_kept": str | null,
     "correction_target": str | null, "target_kind": "reference" | "rewrite" | null}

`draft_kept` is the prefix that the cut left. `ssgen evaluate` and training write the files in evaluations/. Other JSON
files there are shown as tables of their numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.report.curves import Rows
from ssgen_ds.run.evaluations import GAP_FIX, best_of, read_predictions, values_by_step
from ssgen_ds.run.folder import is_finished, read_recipe
from ssgen_ds.run.layout import (
    ATTEMPTS_FILE,
    BEST_FILE,
    ENVIRONMENT_FILE,
    EVALUATIONS_FOLDER,
    GAP_FILE,
    GAP_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
)
from ssgen_ds.run.read_back import (  # fmt: skip
    AttemptRow,
    Best,
    ComparisonFile,
    EvaluationFile,
    GapFile,
    SampleRow,
    Shape,
    WholeStepRow,
    each_row,
    problem_of,
    read_mapping,
    read_rows,
)

_SHAPES: dict[str, type[Shape]] = {"evaluation": EvaluationFile, "comparison": ComparisonFile}
ROUNDS_READ = 500  # of samples.jsonl, about


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. `content` has its scores, `predictions` a row for each answer; none if the file is gone."""

    name: str
    content: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def step(self) -> int | None:
        """The optimizer step at which training made it. None: `ssgen evaluate` made it."""
        return self.content["step"]

    @property
    def model_step(self) -> int:
        """The step of the weights that `ssgen evaluate` used; 0 if it is not known."""
        return self.content.get("model_step") or 0

    @property
    def label(self) -> str:
        return self.name if self.step is None else f"step {self.step}"

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return self.content["scores"]

    @property
    def correction(self) -> dict[str, Any] | None:
        return self.content["correction"]


@dataclass(frozen=True)
class Run:
    """A run folder, read. `rows` has at least one row; `other_numbers` maps a file's stem to its numbers."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    rows: Rows
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)  # of `ssgen compare`
    other_numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    gaps: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the file's stem, gap.json first
    best: dict[str, Any] | None = None  # of the checkpoints, by the recipe's metric
    attempts: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        return self.recipe["method"]["name"]

    @property
    def total_steps(self) -> int | None:
        """From environment.json or the recipe. None for a run counted in epochs whose environment does not tell."""
        return self.environment.get("total_steps") or self.recipe["train"]["max_steps"]

    @property
    def during_training(self) -> list[Evaluation]:
        """The evaluations that training made, in step order."""
        return sorted((one for one in self.evaluations if one.step is not None), key=lambda one: one.step or 0)

    @property
    def by_command(self) -> list[Evaluation]:
        """The evaluations of `ssgen evaluate`. The model that training began with comes first."""
        made = [one for one in self.evaluations if one.step is None]
        return sorted(made, key=lambda one: not self.is_base(one.content["model"]))

    def is_base(self, model: str) -> bool:
        """Whether training began with the model that is called this."""
        return model == self.recipe["model"]["path"]

    def is_own(self, model: str) -> bool:
        """Whether a path is this run or something in it."""
        own, given = self.folder.resolve(), Path(model).resolve()
        return given == own or own in given.parents


def load_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: not a run folder, no finished step yet, or a damaged file, which is named.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the output_dir of a run")
    missing = [name for name in (RECIPE_FILE, ENVIRONMENT_FILE) if not (run_dir / name).is_file()]
    if missing:
        raise UserError(f"{run_dir}: not a run folder, it has no {' and no '.join(missing)}; give a run's output_dir")
    metrics = run_dir / METRICS_FILE
    rows = _rows_of(metrics, WholeStepRow)
    if not rows:
        raise UserError(f"{metrics}: no optimizer step is finished yet; try again once the run has made one")
    recipe = read_recipe(run_dir / RECIPE_FILE).model_dump(mode="json")
    evaluations, comparisons, other_numbers = _evaluations(run_dir / EVALUATIONS_FOLDER)
    return Run(
        folder=run_dir,
        recipe=recipe,
        environment=read_mapping(run_dir / ENVIRONMENT_FILE, "the next start writes it again; until then delete it"),
        rows=rows,
        samples=read_samples(run_dir / SAMPLES_FILE),
        evaluations=evaluations,
        comparisons=comparisons,
        other_numbers=other_numbers,
        gaps=_gaps(run_dir / GAP_FOLDER),
        best=_best_of(run_dir, recipe["eval"]["best"]),
        attempts=_rows_of(run_dir / ATTEMPTS_FILE, AttemptRow),
        is_finished=is_finished(run_dir),
    )


def read_samples(path: Path, most_rounds: int = ROUNDS_READ) -> list[dict[str, Any]]:
    """The lines of the first round, the last one, and evenly spaced rounds in between, in bounded memory.

    Raises UserError: a line before the last is not a JSON object.
    """
    if not path.is_file():
        return []
    kept: list[list[dict[str, Any]]] = []
    last: list[dict[str, Any]] = []
    every = 1
    for index, (_, rows) in enumerate(groupby(each_row(path, SampleRow), lambda row: row["round"])):
        last = list(rows)
        if index % every == 0:
            kept.append(last)
        if len(kept) > most_rounds:
            kept, every = kept[::2], 2 * every
    if kept and kept[-1] is not last:
        kept.append(last)
    return [row for rows in kept for row in rows]


def _evaluations(folder: Path) -> tuple[list[Evaluation], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Evaluations, comparisons by `ssgen compare`, and the numbers of all other files."""
    evaluations, comparisons, other_numbers = [], {}, {}
    for path in _results(folder):
        content = read_mapping(path, "make it again or delete it")
        kind = content.get("kind")
        if isinstance(kind, str) and kind in _SHAPES and (problem := problem_of(content, _SHAPES[kind])):
            raise UserError(f"{path}: damaged: {problem}; make it again or delete it")
        if kind == "evaluation":
            evaluations.append(Evaluation(path.stem, content, read_predictions(path, content)))
        elif kind == "comparison":
            comparisons[path.stem] = content
        else:
            other_numbers[path.stem] = flatten_numbers(content)
    return evaluations, comparisons, other_numbers


def _results(folder: Path) -> list[Path]:
    """The JSON files, without those that a kill left half written."""
    return [file for file in sorted(folder.glob("*.json")) if not file.name.startswith(".")]


def flatten_numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested dictionaries under its dotted key. Lists (the predictions) and texts are left out."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            numbers |= flatten_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _rows_of(path: Path, shape: type[Shape]) -> list[dict[str, Any]]:
    return read_rows(path, shape) if path.is_file() else []


def _best_of(run_dir: Path, metric: str | None) -> dict[str, Any] | None:
    """The content of checkpoints/best.json. If it is damaged, the evaluations decide."""
    path = run_dir / BEST_FILE
    if not path.is_file():
        return None
    try:
        return read_mapping(path, "", Best)
    except UserError:
        found = None if metric is None else best_of(values_by_step(run_dir, metric), metric)
        return None if found is None else asdict(found)


def _gaps(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(_results(folder), key=lambda file: file.name != GAP_FILE)
    return {file.stem: read_mapping(file, GAP_FIX, GapFile) for file in files}

"""A run folder, read for its report: recipe, environment, steps, samples, evaluations and gap. No weights are touched.

A line of selfgen/samples.jsonl is one example as it was trained on:

    {"round": 1, "step": 1, "example_id": "a1", "prompt": "...", "gold": "...",
     "mixed": [["text", is_sampled], ...] | null, "draft": str | null, "draft_kept": str | null,
     "correction_target": str | null, "target_kind": "reference" | "rewrite" | null}

`draft_kept` is the prefix that the cut left. A file in evaluations/ is what `ssgen evaluate` or training wrote; other
JSON there is shown as its numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssgen_ds.attempts import ATTEMPTS_FILE
from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.curves import Rows
from ssgen_ds.logbook import METRICS_FILE, read_rows
from ssgen_ds.run_folder import is_finished

_KEYS = {
    "evaluation": (
        *("model", "data", "step", "num_examples", "settings"),
        *("scores", "behaviour", "correction", "predictions"),
    ),
    "comparison": ("before", "after", "difference"),
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. `content` has its scores; `predictions` one row an answer, none where the file is gone."""

    name: str
    content: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def step(self) -> int | None:
        """The optimizer step at which training made it; None: made by `ssgen evaluate`."""
        return self.content["step"]

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
    gap: dict[str, Any] | None = None
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
        """From environment.json or the recipe; unknown for a run counted in epochs whose environment does not say."""
        return self.environment.get("total_steps") or self.recipe["train"]["max_steps"]

    @property
    def during_training(self) -> list[Evaluation]:
        """In step order."""
        return sorted((one for one in self.evaluations if one.step is not None), key=lambda one: one.step or 0)

    @property
    def by_command(self) -> list[Evaluation]:
        """The model that training began with comes first."""
        made = [one for one in self.evaluations if one.step is None]
        return sorted(made, key=lambda one: not self.is_base(one.content["model"]))

    def is_base(self, model: str) -> bool:
        """Whether a model reference is the one that training began with."""
        return model == self.recipe["model"]["path"]

    def is_own(self, model: str) -> bool:
        """Whether a model reference is this run or something in it."""
        own, given = self.folder.resolve(), Path(model).resolve()
        return given == own or own in given.parents


def load_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: not a run folder, no finished step yet, or a damaged file, which is named.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the output_dir of a run")
    missing = [name for name in ("recipe.yaml", "environment.json") if not (run_dir / name).is_file()]
    if missing:
        raise UserError(f"{run_dir}: not a run folder, it has no {' and no '.join(missing)}; give a run's output_dir")
    metrics = run_dir / METRICS_FILE
    rows = _rows_of(metrics)
    if not rows:
        raise UserError(f"{metrics}: no optimizer step is finished yet; try again once the run has made one")
    evaluations, comparisons, other_numbers = _evaluations(run_dir / "evaluations")
    return Run(
        folder=run_dir,
        recipe=_read_mapping(run_dir / "recipe.yaml"),
        environment=_read_mapping(run_dir / "environment.json"),
        rows=rows,
        samples=_rows_of(run_dir / "selfgen" / "samples.jsonl"),
        evaluations=evaluations,
        comparisons=comparisons,
        other_numbers=other_numbers,
        gap=_mapping_if_there(run_dir / "gap" / "gap.json"),
        best=_mapping_if_there(run_dir / "checkpoints" / "best.json"),
        attempts=_rows_of(run_dir / ATTEMPTS_FILE),
        is_finished=is_finished(run_dir),
    )


def _evaluations(folder: Path) -> tuple[list[Evaluation], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """What `ssgen evaluate` and training wrote, what `ssgen compare` did, and the numbers of whatever else is there."""
    evaluations, comparisons, other_numbers = [], {}, {}
    for path in sorted(folder.glob("*.json")):
        content = _read_mapping(path)
        kind = content.get("kind")
        if kind in _KEYS and (missing := [key for key in _KEYS[kind] if key not in content]):
            raise UserError(f"{path}: damaged: it has no {', '.join(missing)}; make it again or delete it")
        if kind == "evaluation":
            evaluations.append(Evaluation(path.stem, content, _rows_of(path.with_name(content["predictions"]))))
        elif kind == "comparison":
            comparisons[path.stem] = content
        else:
            other_numbers[path.stem] = flatten_numbers(content)
    return evaluations, comparisons, other_numbers


def flatten_numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested dictionaries under its dotted key. Lists (the predictions) and texts are left out."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            numbers |= flatten_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _rows_of(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []


def _mapping_if_there(path: Path) -> dict[str, Any] | None:
    return _read_mapping(path) if path.is_file() else None


def _read_mapping(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged: {error}; restore or delete it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, got {type(content).__name__}; restore or delete it")
    return content

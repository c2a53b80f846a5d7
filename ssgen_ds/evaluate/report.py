"""One self-contained report.html of a run, finished or under way: `ssgen report RUN`. Needs no network.

Reads recipe.yaml, environment.json, metrics.jsonl and, where they are, selfgen/samples.jsonl, evaluations/*.json and
model/. A line of samples.jsonl is one example as it was trained on:

    {"round": 1, "step": 1, "example_id": "a1", "prompt": "...", "gold": "...",
     "mixed": [["text", is_sampled], ...] | null, "draft": str | null, "draft_kept": str | null,
     "correction_target": str | null, "target_kind": "reference" | "rewrite" | null}

`draft_kept` is the prefix that the cut left.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.curves import Rows, draw_curves, total
from ssgen_ds.logbook import METRICS_FILE, read_rows
from ssgen_ds.progress import compact, duration
from ssgen_ds.run_folder import is_finished

REPORT_FILE = "report.html"
EXAMPLES_PER_ROUND = 3
METHOD_TITLES = {
    "sft": "Supervised finetuning",
    "bss": "Batch-scheduled sampling",
    "rac": "Reference-answer-based correction",
    "bss+rac": "Batch-scheduled sampling with correction",
}


@dataclass(frozen=True)
class Run:
    """A run folder, read. `rows` has at least one row; `evaluations` maps a file's stem to its numbers."""

    name: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    rows: Rows
    samples: list[dict[str, Any]]
    evaluations: dict[str, dict[str, float]]
    is_finished: bool

    @property
    def method(self) -> str:
        return self.recipe["method"]["name"]

    @property
    def total_steps(self) -> int | None:
        """From environment.json or the recipe; unknown for a run counted in epochs whose environment does not say."""
        return self.environment.get("total_steps") or self.recipe["train"]["max_steps"]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path; a reader never sees half a file.

    Raises:
        UserError: not a run folder, no finished step yet, or a damaged file, which is named.
    """
    page = render_report(load_run(Path(run_dir)))
    path = Path(run_dir) / REPORT_FILE
    partial = path.with_name(f"{REPORT_FILE}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def load_run(run_dir: Path) -> Run:
    """Read a run folder; the model's weights are not touched. Raises UserError as `write_report` does."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the output_dir of a run")
    missing = [name for name in ("recipe.yaml", "environment.json") if not (run_dir / name).is_file()]
    if missing:
        raise UserError(f"{run_dir}: not a run folder, it has no {' and no '.join(missing)}; give a run's output_dir")
    metrics = run_dir / METRICS_FILE
    rows = read_rows(metrics) if metrics.is_file() else []
    if not rows:
        raise UserError(f"{metrics}: no optimizer step is finished yet; try again once the run has made one")
    samples = run_dir / "selfgen" / "samples.jsonl"
    return Run(
        name=run_dir.resolve().name,
        recipe=_read_mapping(run_dir / "recipe.yaml"),
        environment=_read_mapping(run_dir / "environment.json"),
        rows=rows,
        samples=read_rows(samples) if samples.is_file() else [],
        evaluations={
            path.stem: flatten_numbers(_read_mapping(path)) for path in sorted((run_dir / "evaluations").glob("*.json"))
        },
        is_finished=is_finished(run_dir),
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged: {error}; restore or delete it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, got {type(content).__name__}; restore or delete it")
    return content


def flatten_numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested dictionaries under its dotted key. Lists (the predictions) and texts are left out."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            numbers |= flatten_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def headline(run: Run) -> list[tuple[str, str]]:
    """The run in a handful of numbers: (label, value), ready to print."""
    generation, training = total(run.rows, "selfgen_seconds"), total(run.rows, "step_seconds")
    last_losses = [row["loss"] for row in run.rows[-10:] if row["loss"] is not None]
    final = f"{statistics.fmean(last_losses):.3f}" if last_losses else "not a number"
    numbers = [(f"final loss, mean of {len(last_losses)} steps" if len(last_losses) > 1 else "final loss", final)]
    eval_losses = _eval_losses(run.rows)
    if len(eval_losses) > 1:
        numbers.append(("evaluation loss, first → last", f"{eval_losses[0]:.3f} → {eval_losses[-1]:.3f}"))
    elif eval_losses:
        numbers.append(("evaluation loss", f"{eval_losses[0]:.3f}"))
    numbers.append(("tokens trained", compact(total(run.rows, "num_tokens"))))
    if "bss" in run.method:
        numbers.append(("sampled-token share", f"{_sampled_share(run.rows):.1%}"))
    if "rac" in run.method:
        numbers.append(("corrections trained", compact(total(run.rows, "num_corrections"))))
    if run.method != "sft":
        numbers.append(("generation's share of the time", f"{generation / max(generation + training, 1e-9):.0%}"))
    numbers.append(("total time", duration(generation + training)))
    return numbers


def _eval_losses(rows: Rows) -> list[float]:
    return [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]


def _sampled_share(rows: Rows) -> float:
    """Over the whole run: each step counts by its tokens."""
    known = [row for row in rows if row.get("sampled_token_share") is not None]
    num_tokens = sum(row["num_tokens"] for row in known)
    return sum(row["sampled_token_share"] * row["num_tokens"] for row in known) / max(num_tokens, 1)


def find_warnings(run: Run) -> list[str]:
    """What a careful reader would stumble over, in sentences that say what to look at. Simple rules, no verdicts."""
    return [
        *_loss_warnings(run.rows),
        *_generation_warnings(run),
        *(
            f"evaluations/{name}.json: no answer ended with EOS ({key} is 0); look at the labels with `ssgen preview`"
            for name, numbers in run.evaluations.items()
            for key, value in numbers.items()
            if key.rpartition(".")[2] == "eos_rate" and value == 0
        ),
    ]


def _loss_warnings(rows: Rows) -> list[str]:
    warnings = []
    if broken := [row["step"] for row in rows if row["loss"] is None or row["grad_norm"] is None]:
        warnings.append(
            f"Loss or gradient norm was not finite at {_steps(broken)}; such an update does harm or nothing."
        )
    if spikes := loss_spikes(rows):
        warnings.append(f"The loss jumped at {_steps(spikes)}; look at the data there, or lower train.lr.")
    eval_losses = _eval_losses(rows)
    if len(eval_losses) > 1 and eval_losses[-1] > min(eval_losses) * 1.02:
        warnings.append(
            f"The evaluation loss ended at {eval_losses[-1]:.3f}, above its best, {min(eval_losses):.3f}: "
            "fewer steps or a lower train.lr may do better."
        )
    return warnings


def loss_spikes(rows: Rows, window: int = 20) -> list[int]:
    """Steps whose loss stands far above the `window` steps before: over 6 median absolute deviations, and over 25%."""
    known = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    spikes = []
    for index in range(window // 2, len(known)):
        before = [loss for _, loss in known[max(index - window, 0) : index]]
        median = statistics.median(before)
        deviation = statistics.median(abs(loss - median) for loss in before)
        step, loss = known[index]
        if loss - median > max(6 * deviation, 0.25 * abs(median)):
            spikes.append(step)
    return spikes


def _generation_warnings(run: Run) -> list[str]:
    warnings = []
    if "bss" in run.method and total(run.rows, "mix_rate") > 0 and total(run.rows, "sampled_token_share") == 0:
        warnings.append("No token was sampled although the mix rate is above 0: the responses may be too short for it.")
    if "rac" in run.method:
        num_empty, num_corrections = total(run.rows, "num_empty_drafts"), total(run.rows, "num_corrections")
        if num_empty and not num_corrections:
            warnings.append(
                "Every draft was empty, so nothing was corrected; look at the prompts with `ssgen preview`."
            )
        elif num_empty > num_corrections:
            warnings.append(f"{num_empty:.0f} of {num_empty + num_corrections:.0f} drafts were empty.")
    pairs = [(_kept(sample), sample["correction_target"]) for sample in run.samples if sample["correction_target"]]
    copies = sum(kept.strip() == target.strip() for kept, target in pairs)
    if copies:
        warnings.append(f"{copies} of {len(pairs)} sampled corrections copy their draft: they teach no correcting.")
    return warnings


def _steps(steps: list[int], shown: int = 5) -> str:
    listed = ", ".join(map(str, steps[:shown]))
    more = f" and {len(steps) - shown} more" if len(steps) > shown else ""
    return f"step{'s' * (len(steps) > 1)} {listed}{more}"


def _kept(sample: dict[str, Any]) -> str:
    """The part of the draft that the correction starts from: all of it where nothing was cut."""
    return sample["draft"] or "" if sample["draft_kept"] is None else sample["draft_kept"]


def _examples(samples: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A few samples of the first and of the last round, each draft split into what was kept and what was cut."""
    numbers = sorted({sample["round"] for sample in samples})
    groups = []
    for number in numbers[:1] + numbers[1:][-1:]:
        shown = [sample for sample in samples if sample["round"] == number][:EXAMPLES_PER_ROUND]
        split = [
            {**sample, "kept": _kept(sample), "cut": (sample["draft"] or "").removeprefix(_kept(sample))}
            for sample in shown
        ]
        groups.append((f"Round {number}", split))
    return groups


def render_report(run: Run) -> str:
    """The page as text. Everything that a run wrote is escaped; only the figures are markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = sorted({key for numbers in run.evaluations.values() for key in numbers})
    last_step = run.rows[-1]["step"]
    of_total = f" of {run.total_steps}" if run.total_steps else ""
    return templates.get_template("report.html.j2").render(
        run=run,
        method_title=METHOD_TITLES[run.method],
        status="finished" if run.is_finished else "in progress",
        steps=f"step {last_step}{of_total}",
        headline=headline(run),
        curves=draw_curves(run.rows),
        examples=_examples(run.samples),
        warnings=find_warnings(run),
        metrics=metrics,
        recipe_text=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        environment_text=yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True),
    )

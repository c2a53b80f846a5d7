"""From the results of single runs to bench/results/study-controlled.json, its plots and its document."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.study.intervals import correction_counts, mean_and_seeds, paired_difference
from bench.study.settings import RATES, Run, Settings
from bench.study.worker import result_path

ANSWERS = ("greedy", "sampled", "greedy_corrected", "sampled_corrected")
Results = list[dict[str, Any]]  # of one task and method, by seed


def write_summary(settings: Settings, folder: Path, results_dir: Path, docs_dir: Path) -> dict[str, Any]:
    """Sum up the runs that are done; returns what was written."""
    from bench.selfgen.table import describe_machine
    from bench.study.document import write_document
    from bench.study.plots import draw_gap, draw_lengths

    summary = {
        "machine": describe_machine(),
        "settings": asdict(settings),
        "tasks": {task: summarize_task(task, settings, folder) for task in settings.tasks},
    }
    results_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1) + "\n"
    (results_dir / "study-controlled.json").write_text(text, encoding="utf-8")
    draw_lengths(summary, results_dir / "study-controlled-length.png")
    draw_gap(summary, results_dir / "study-controlled-gap.png")
    write_document(summary, docs_dir / "results-controlled.md")
    return summary


def summarize_task(task: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Every method that has results, by name; a seed counts where its SFT run is done, too."""

    def results(method: str, seeds: list[int]) -> Results:
        files = [result_path(folder, Run(task, method, seed)) for seed in seeds]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]

    known = [result["seed"] for result in results("sft", list(settings.seeds))]
    found = {}
    for method in settings.methods:
        ours = results(method, known)
        if ours:
            base = results("sft", [result["seed"] for result in ours])
            found[method] = summarize_method(ours, base, settings.tasks[task].eval_lengths, settings.eval_each)
    return found


def summarize_method(ours: Results, base: Results, lengths: tuple[int, ...], each: int) -> dict[str, Any]:
    """All figures of a method on a task. `base`: the SFT runs of the same seeds; prompts are sorted by length."""

    def right(results: Results, name: str) -> np.ndarray:
        return np.array([result[name] for result in results])

    def mean(*path: str) -> float:
        return float(np.mean([_at(result, path) for result in ours]))

    entry: dict[str, Any] = {"seeds": [result["seed"] for result in ours], "answers": {}, "versus_sft": {}}
    for name in (name for name in ANSWERS if name in ours[0]):
        values_SN = right(ours, name)
        by_length = values_SN.reshape(len(ours), len(lengths), each).mean(axis=(0, 2)).tolist()
        entry["answers"][name] = {**mean_and_seeds(values_SN), "by_length": dict(zip(lengths, by_length, strict=True))}
        # A corrected answer, too, is held against what SFT answers at once.
        entry["versus_sft"][name] = paired_difference(values_SN, right(base, name.removesuffix("_corrected")))
    for name in ("greedy", "sampled"):
        if f"{name}_corrected" in ours[0]:
            after = right(ours, f"{name}_corrected")
            entry.setdefault("corrections", {})[name] = {
                **correction_counts(right(ours, name), after),
                **paired_difference(after, right(ours, name)),
            }
    entry["token_accuracy"] = {
        name: {"mean": mean(name), "seeds": [result[name] for result in ours]}
        for name in ("teacher_forced", "free_running")
    }
    entry["gap"] = {
        contexts: {
            str(rate): {
                what: {
                    "mean": mean("gap", contexts, str(rate), what),
                    "seeds": [result["gap"][contexts][str(rate)][what] for result in ours],
                }
                for what in ("nll", "top1")
            }
            for rate in RATES
        }
        for contexts in ("own", "sft")
    }
    # The first results of a study that has gone on since were without these two.
    entry["generated"] = _generated([result["generated"] for result in ours if "generated" in result])
    entry["seconds"] = _costs(ours)
    return entry


def _generated(results: list[Results]) -> dict[str, list[float]]:
    """What training generated, by quarter of the run, means over seeds; {} for SFT."""
    quarters = list(zip(*results, strict=True))
    names = [name for name, value in quarters[0][0].items() if value is not None] if quarters else []
    return {name: [float(np.mean([run[name] for run in quarter])) for quarter in quarters] for name in names}


def _costs(results: Results) -> dict[str, Any]:
    """Medians over seeds. Processor seconds hold starting and exporting the run, some 3 s, and do not depend on what
    else the machine does; clock seconds do, but the share of generation in them does hardly."""
    times = [result["seconds"] for result in results]
    return {
        "cpu_per_step": float(
            np.median([time["train_cpu"] / time["num_steps"] for time in times if "train_cpu" in time])
        ),
        "generation_share": float(
            np.median([time["generation"] / (time["generation"] + time["steps"]) for time in times])
        ),
        "clock_per_run": float(np.median([time["train"] for time in times])),
        "runs": times,
    }


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value[key]
    return value

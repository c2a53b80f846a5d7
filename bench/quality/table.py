"""Results of the study as one JSON file and a page: means over seeds, and paired differences from SFT."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.settings import LONGER, MAX_PROMPT_TOKENS, RUNS, STEPS, TEST_EXAMPLES
from ssgen_ds.metrics.intervals import difference, interval
from ssgen_ds.run.folder import package_versions

METRICS = ("rouge1", "rouge2", "rougeL")
PAGE = Path("docs/results-smollm2.md")
DISCUSSION = Path(__file__).parent / "discussion.md"
COMMAND = "make study-smollm2"
_HEAD = "| model | ROUGE-1 | ROUGE-2 | ROUGE-L, 95 % | against SFT, 95 % | at equal time | s/step | ended |"


def write_results(folder: Path) -> None:
    """bench/results/study-smollm2.json and docs/results-smollm2.md, from what has been measured so far."""
    measured = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    file = folder.with_name(f"{folder.name}-costs.json")
    costs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    seconds = {name: cost["train_seconds"] + cost["selfgen_seconds"] for name, cost in costs.items()}
    seeds = sorted({one["seed"] for name, one in measured.items() if name != "base"})
    rows = [_base(measured, "base", "not finetuned", "scores")] if "base" in measured else []
    for run in RUNS:
        if run.name in LONGER:
            continue
        done = [seed for seed in seeds if f"{run.name}-{seed}" in measured]
        if not done:
            continue
        which = [("scores", run.title)]
        if run.corrected:
            which = [("first_scores", f"{run.title}, direct"), ("scores", f"{run.title}, corrected")]
        rows += [_row(measured, seconds, run.name, title, scores, done) for scores, title in which]
    result = {
        "command": COMMAND,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": package_versions(),
        "steps": STEPS,
        "test_examples": TEST_EXAMPLES,
        "seeds": seeds,
        "rows": rows,
    }
    folder.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(_page(result), encoding="utf-8")


def _base(measured: dict[str, Any], name: str, title: str, which: str) -> dict[str, Any]:
    one = measured[name]
    return {"title": title, "seeds": [], "behaviour": one["behaviour"]} | {
        metric: asdict(interval([row[metric] for row in one[which]])) for metric in METRICS
    }


def _row(
    measured: dict[str, Any], seconds: dict[str, float], name: str, title: str, which: str, seeds: list[int]
) -> dict[str, Any]:
    """Each example counts once, with its mean over the seeds; so do the differences from SFT.

    `seconds`: of one step, by method, self-generation included.
    """
    runs = [measured[f"{name}-{seed}"] for seed in seeds]

    def values(many: list[dict[str, Any]], key: str, metric: str) -> np.ndarray:
        return np.mean([[row[metric] for row in one[key]] for one in many], axis=0)

    row: dict[str, Any] = {"title": title, "seeds": seeds}
    row |= {metric: asdict(interval(values(runs, which, metric))) for metric in METRICS}
    row["by_seed"] = {metric: [float(values([one], which, metric).mean()) for one in runs] for metric in METRICS}
    row["behaviour"] = {key: float(np.mean([one["behaviour"][key] for one in runs])) for key in runs[0]["behaviour"]}
    row["num_tokens"] = float(np.mean([one["num_tokens"] for one in runs]))
    if name in seconds:
        row["seconds_per_step"] = seconds[name]
    if which == "scores" and runs[0]["first_scores"]:
        direct, corrected = (values(runs, key, "rougeL") for key in ("first_scores", "scores"))
        row["against_direct"] = asdict(difference(direct, corrected))
    sft = [measured[f"sft-{seed}"] for seed in seeds if f"sft-{seed}" in measured]
    if name != "sft" and len(sft) == len(seeds):
        row["against_sft"] = asdict(difference(values(sft, "scores", "rougeL"), values(runs, which, "rougeL")))
        if {name, "sft"} <= set(seconds):
            steps = runs[0]["steps"] * seconds[name] / seconds["sft"]
            row["equal_time"] = _equal_time(measured, steps, seeds, values(runs, which, "rougeL"))
    return row


def _equal_time(measured: dict[str, Any], steps: float, seeds: list[int], own: np.ndarray) -> Any:
    """Against the shortest SFT run that had at least as many steps as SFT makes in the time."""
    for longer in LONGER:
        many = [measured[name] for seed in seeds if (name := f"{longer}-{seed}") in measured]
        if len(many) == len(seeds) and many[0]["steps"] >= steps:
            break
    else:
        return None
    scores = np.mean([[one["rougeL"] for one in run["scores"]] for run in many], axis=0)
    return {"steps": many[0]["steps"], **asdict(difference(scores, own))}


def _page(result: dict[str, Any]) -> str:
    lines = [
        "# SmolLM2-135M-Instruct on XSum",
        "",
        f"<!-- Written by `{result['command']}`; change bench/quality/ instead. -->",
        "",
        f"Made by `{result['command']}` ([figures](../bench/results/study-smollm2.json), the scores of each example in",
        f"`bench/results/study-smollm2/`). {result['steps']} steps of 8 examples, all weights, float32, on "
        f"{result['cores']} CPU cores; greedy answers",
        f"to {result['test_examples']} held-out articles (split by a hash of the id), "
        f"prompts cut to {MAX_PROMPT_TOKENS} tokens. Seeds: {', '.join(map(str, result['seeds']))}.",
        "*Against SFT* is the paired difference in ROUGE-L at equal steps, *at equal time* that from an SFT run of so",
        "many more steps that it took at least as many seconds, generation included. Intervals cover the choice of",
        "articles, not of the seed.",
        "",
        _HEAD,
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        score, equal = row["rougeL"], row.get("equal_time")
        cells = [
            row["title"],
            f"{row['rouge1']['mean']:.3f}",
            f"{row['rouge2']['mean']:.3f}",
            f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]",
            _difference(row.get("against_sft")),
            f"{_difference(equal)} ({equal['steps']} steps)" if equal else "",
            f"{row['seconds_per_step']:.1f}" if "seconds_per_step" in row else "",
            f"{row['behaviour']['eos_rate']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    turns = [
        f"{row['title'].removesuffix(', corrected')} {_difference(row['against_direct'])}"
        for row in result["rows"]
        if "against_direct" in row
    ]
    if turns:
        lines += ["", f"What the correction turn changed, corrected against direct: {'; '.join(turns)}."]
    return "\n".join(lines) + "\n\n" + DISCUSSION.read_text(encoding="utf-8")


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"

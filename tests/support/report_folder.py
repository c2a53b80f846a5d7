"""A run folder as a short training run leaves it, evaluated and with its gap measured: invented but plausible numbers.

Scores and the gap are summed up by the product's own code, so that their form is the real one. Texts are hostile.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from ssgen_ds.evaluate.summary import summarize
from ssgen_ds.metrics.scorer import Scorer
from ssgen_ds.recipe.load import dump_recipe, parse_recipe

STEPS_PER_ROUND = 8
HOSTILE = "<script>alert('x')</script> & <b>bold</b>"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "<|im_start|>user\nSummarize:\n\n{}<|im_end|>\n<|im_start|>assistant\n"
PLACES = ["Whitby", "Derby", "Leeds", "York", "Hull", "Bath", "Truro", "Ely"]


def make_row(step: int, noise: random.Random) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    starts_round = step % STEPS_PER_ROUND == 1
    row = {
        "step": step,
        "round": (step - 1) // STEPS_PER_ROUND + 1,
        "epoch": step / 48,
        "loss": 2.1 + 1.2 * math.exp(-step / 25) + noise.gauss(0, 0.06),
        "lr": 1e-5 * 0.5 * (1 + math.cos(math.pi * step / 96)),
        "grad_norm": 0.8 + abs(noise.gauss(0, 0.15)),
        "skipped_steps": 0,
        "num_tokens": 3000,
        "mix_rate": 0.25 * step / 96,
        "sampled_token_share": 0.24 * step / 96,
        "changed_token_share": 0.12 * step / 96,
        "selfgen_passes": 6 if starts_round else 0,
        "selfgen_seconds": 9.0 if starts_round else 0.0,
        "step_seconds": 2.0,
        "tokens_per_second": 1500.0,
        "peak_memory_bytes": 3 * 2**30,
        "peak_train_bytes": 3 * 2**30,
        "peak_generate_bytes": 2**30 if starts_round else 0,
        "peak_optimizer_bytes": 2**31,
        "num_corrections": 30,
        "num_empty_drafts": 2,
        "num_truncated_drafts": 4,
        "num_right_drafts": 3,
        "num_rewrites_used": 0,
    }
    if starts_round:
        row |= {
            **{"selfgen_calls": 120, "selfgen_token_forwards": 50_000, "selfgen_draws": 9_000},
            **{"selfgen_accepted_length": 2.5, "selfgen_first_draws": 4_000, "selfgen_guess_hits": 1_000},
            **{"selfgen_flips": 1_200, "selfgen_flip_rate": 0.3, "selfgen_flip_bound": 0.4, "selfgen_ties": 2},
            **{"selfgen_verified": 0, "selfgen_mismatches": 0},
            **{"selfgen_strategy": "sharded", "selfgen_block": "mixing 8, drafting 4"},
        }
    return row | ({"eval_loss": 2.2 + math.exp(-step / 30), "eval_num_tokens": 9000} if step % 24 == 0 else {})


def make_sample(round_number: int, example_id: str, **changes: Any) -> dict[str, Any]:
    """A line of selfgen/samples.jsonl."""
    sample = {
        "round": round_number,
        "step": (round_number - 1) * STEPS_PER_ROUND + 1,
        "example_id": example_id,
        "prompt": "Summarize:\n\nHeavy rain closed the coast road near Whitby on Monday. " + HOSTILE,
        "gold": "The coast road near Whitby was closed on Monday after heavy rain washed mud across both lanes.",
        "mixed": [
            ["The coast road", False],
            [" at", True],
            [" Whitby was closed on", False],
            [" Tuesday", True],
            [" after heavy rain washed mud across both lanes.", False],
        ],
        "draft": "Rain fell on Monday near Whitby. The road is open. The road is open.",
        "draft_kept": "Rain fell on Monday near Whitby.",
        "correction_target": "The coast road near Whitby was closed on Monday after heavy rain.",
        "target_kind": "reference",
    }
    return sample | changes


def make_predictions(seed: int, quality: float, corrected: bool = False, number: int = 24) -> list[dict[str, Any]]:
    """Answers of which a share `quality` of the words is right; corrections mend half of the others."""
    noise, scorer, rows = random.Random(seed), Scorer(["rouge", "em"]), []
    for index in range(number):
        place = PLACES[index % len(PLACES)]
        reference = f"The coast road near {place} was closed on Monday after heavy rain washed mud across both lanes."
        turns = [_garbled(reference, quality, noise)]
        if corrected:
            better = _garbled(reference, (1 + quality) / 2, noise)
            turns.append(turns[0] if index % 5 == 0 else better)
        scores = [scorer(text, [reference]) for text in turns]
        rows.append({
            "index": index, "id": f"row-{index}", "sample": 0,
            "prompt": PROMPT.format(f"Rain near {place}, day {index}. {HOSTILE}"),
            "references": [reference], "turns": turns, "prediction": turns[-1], "stopped": index % 6 > 0,
            "num_tokens": len(turns[-1].split()), "reference_tokens": 17,
            "scores": scores[-1], "first_scores": scores[0],
        })  # fmt: skip
    return rows


def _garbled(text: str, quality: float, noise: random.Random) -> str:
    return " ".join(word if noise.random() < quality else noise.choice(PLACES) for word in text.split())


def write_evaluation(folder: Path, name: str, predictions: list[dict[str, Any]], **changes: Any) -> None:
    """A file of evaluations/ and its predictions, as `ssgen evaluate` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    corrects = int(any(len(row["turns"]) > 1 for row in predictions))
    settings = {"max_new_tokens": 32, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "correct": corrects}
    content = {
        "kind": "evaluation",
        "model": BASE,
        "data": "data/held-out.jsonl",
        "step": None,
        "num_examples": len(predictions),
        "settings": {**settings, "samples": 1},
        **summarize(predictions, list(predictions[0]["scores"])),
        "predictions": f"{name}.predictions.jsonl",
        "seconds": 12.5,
    } | changes
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    write_lines(folder / content["predictions"], predictions)


def make_gap(models: list[tuple[str, str]], changes: tuple[float, ...] = (0.5, 0.35)) -> dict[str, Any]:
    """gap.json of models whose gap, in nats at rate 1, is about one of `changes` each."""
    from ssgen_ds.evaluate.gap_measure import RATES, GapSettings, Measurement, Scores
    from ssgen_ds.evaluate.gap_numbers import gap_result

    noise = np.random.default_rng(0)
    lengths = [12 + index for index in range(10)]
    gold = [[1] * length for length in lengths]
    base = [noise.gamma(2.0, 1.0, length).astype(np.float32) for length in lengths]
    contexts = {rate: [[1] * length for length in lengths] for rate in RATES}
    measured = []
    for change in changes:
        scored = {
            rate: [Scores(nll + np.float32(change * rate), nll + change * rate < 1.5) for nll in base] for rate in RATES
        }
        measured.append(Measurement(contexts, scored, scored, dict.fromkeys(RATES, 0.1)))
    return gap_result(models, measured, gold, GapSettings()) | {"data": "data/held-out.jsonl", "seconds": 3.0}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(run_dir: Path, num_steps: int = 96, method: str = "bss+rac", finished: bool = True) -> Path:
    """What training leaves; not evaluated."""
    noise = random.Random(0)
    recipe = parse_recipe(
        {
            "model": {"path": BASE},
            "data": {"train": "train.jsonl"},
            "method": {"name": method},
            "train": {"max_steps": 96},
            "output_dir": str(run_dir),
        }
    )
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    environment = {"time": "2026-01-31T12:00:00", "world_size": 2, "device": "cpu", "zero_stage": 3}
    (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    write_lines(run_dir / "metrics.jsonl", [make_row(step, noise) for step in range(1, num_steps + 1)])
    rounds = (1, math.ceil(num_steps / STEPS_PER_ROUND))
    samples = [make_sample(number, f"{number}-{index}") for number in rounds for index in range(4)]
    write_lines(run_dir / "selfgen" / "samples.jsonl", samples)
    if finished:
        (run_dir / "finished.json").write_text("{}")
    return run_dir


def evaluate_run(run_dir: Path) -> None:
    """What training with `eval.best`, `ssgen evaluate` of the base and of the run, and `ssgen gap` leave."""
    folder = run_dir / "evaluations"
    for step, quality in ((24, 0.4), (48, 0.5), (72, 0.6), (96, 0.55)):
        own = {"model": str(run_dir), "data": "the run's evaluation examples", "step": step, "loss": 3 - quality}
        write_evaluation(folder, f"step-{step:08d}", make_predictions(step, quality), **own)
    best = {"step": 72, "metric": "rougeL", "value": 0.6}
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "best.json").write_text(json.dumps(best), encoding="utf-8")
    write_evaluation(folder, "base", make_predictions(1, 0.4))
    write_evaluation(folder, "trained", make_predictions(2, 0.6, corrected=True), model=str(run_dir))
    (run_dir / "gap").mkdir()
    gap = make_gap([("base", BASE), ("trained", str(run_dir))])
    (run_dir / "gap" / "gap.json").write_text(json.dumps(gap), encoding="utf-8")

"""A run folder as a short training run leaves it, with invented but plausible numbers and hostile texts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.config import dump_recipe, parse_recipe

STEPS_PER_ROUND = 8
HOSTILE = "<script>alert('x')</script> & <b>bold</b>"


def make_row(step: int, noise: random.Random) -> dict[str, Any]:
    starts_round = step % STEPS_PER_ROUND == 1
    row = {
        "step": step,
        "round": (step - 1) // STEPS_PER_ROUND + 1,
        "epoch": step / 48,
        "loss": 2.1 + 1.2 * math.exp(-step / 25) + noise.gauss(0, 0.06),
        "lr": 1e-5 * 0.5 * (1 + math.cos(math.pi * step / 96)),
        "grad_norm": 0.8 + abs(noise.gauss(0, 0.15)),
        "num_tokens": 3000,
        "mix_rate": 0.25 * step / 96,
        "sampled_token_share": 0.24 * step / 96,
        "selfgen_passes": 6 if starts_round else 0,
        "selfgen_seconds": 9.0 if starts_round else 0.0,
        "step_seconds": 2.0,
        "tokens_per_second": 1500.0,
        "peak_memory_bytes": 3 * 2**30,
        "num_corrections": 30,
        "num_empty_drafts": 2,
        "num_rewrites_used": 0,
    }
    return row | ({"eval_loss": 2.2 + math.exp(-step / 30), "eval_num_tokens": 9000} if step % 24 == 0 else {})


def make_sample(round_number: int, example_id: str, **changes: Any) -> dict[str, Any]:
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


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(num_steps=96, method="bss+rac", finished=True) -> the run folder."""

    def make(num_steps: int = 96, method: str = "bss+rac", finished: bool = True) -> Path:
        run_dir = tmp_path / f"{method}-run"
        noise = random.Random(0)
        recipe = parse_recipe(
            {
                "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
                "data": {"train": "train.jsonl"},
                "method": {"name": method},
                "train": {"max_steps": 96},
                "output_dir": str(run_dir),
            }
        )
        run_dir.mkdir()
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        environment = {"versions": {"torch": "2.13.0"}, "world_size": 2, "device": "cpu", "zero_stage": 3}
        (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        write_lines(run_dir / "metrics.jsonl", [make_row(step, noise) for step in range(1, num_steps + 1)])
        rounds = (1, math.ceil(num_steps / STEPS_PER_ROUND))
        samples = [make_sample(number, f"{number}-{index}") for number in rounds for index in range(4)]
        write_lines(run_dir / "selfgen" / "samples.jsonl", samples)
        if finished:
            (run_dir / "finished.json").write_text("{}")
        return run_dir

    return make

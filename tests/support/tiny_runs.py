"""Recipes for tiny models on tiny data, in a folder made once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import Recipe
from tests.support.tiny_models import save_tiny_model

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "moon", "tree", "fish"]


def make_inputs(folder: Path, families: tuple[str, ...] = ("llama",)) -> None:
    """`folder/FAMILY` models and `folder/train.jsonl`: 26 rows of uneven lengths."""
    for family in families:
        save_tiny_model(family, folder / family)
    rng = random.Random(0)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(26):
            words = rng.choices(WORDS, k=rng.randint(1, 5))
            row = {"id": f"row-{i}", "prompt": " ".join(words), "completion": " ".join(reversed(words)), "blank": " "}
            file.write(json.dumps(row) + "\n")


def tiny_recipe(folder: Path, output: Path | str, **overrides: Any) -> Recipe:
    """A recipe over `make_inputs`' folder; overrides are dotted with double underscores (`train__lr=1e-3`)."""
    raw: dict[str, Any] = {
        "model": {"path": str(folder / "llama")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "max_prompt_tokens": 48,
            "max_response_tokens": 40,
            "ignore_fields": ["blank"],
        },
        "method": {"bss": {"schedule": "constant", "mix_rate": 0.3}, "rac": {"max_draft_tokens": 8}},
        "train": {"max_steps": 4, "global_batch": 6, "micro_batch": 2, "lr": 1e-2, "warmup": 0, "schedule": "constant"},
        "deepspeed": "ds_configs/zero0.json",
        "selfgen": {"refresh_every": 2, "batch": 4, "block": "all", "strategy": "sharded"},
        "log": {"tensorboard": False},
        "output_dir": str(output),
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return parse_recipe(raw)

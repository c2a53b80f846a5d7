"""Runs that are compared: the same recipe on two local ranks, on two SLURM nodes, and on two nodes without SLURM."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ssgen_ds.recipe.load import dump_recipe
from tests.support.launch import run, torchrun
from tests.support.tiny_runs import tiny_recipe

STEPS = 4
LIMIT = 150


def recipe_file(folder: Path, name: str, method: str = "bss+rac", **overrides: object) -> Path:
    """A recipe over `make_inputs`' folder: ZeRO-3, a checkpoint every second step; results in `folder/runs/name`."""
    settings = {
        "method__name": method,
        "deepspeed": "ds_configs/zero3.json",
        "train__max_steps": STEPS,
        "checkpoint__every": 2,
        **overrides,
    }
    file = folder / f"{name}.yaml"
    file.write_text(dump_recipe(tiny_recipe(folder, folder / "runs" / name, **settings)), encoding="utf-8")
    return file


@cache
def reference(folder: Path, method: str = "bss+rac") -> Path:
    """Two local ranks, uninterrupted."""
    name = f"reference-{method}"
    result = run(torchrun("ssgen_ds.train", str(recipe_file(folder, name, method))), LIMIT)
    assert result.returncode == 0, result
    return folder / "runs" / name

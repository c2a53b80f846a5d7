"""Every method x adapter x ZeRO stage trains on this many ranks: the cases of `test_matrix.py`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ssgen_ds.distributed import World
from ssgen_ds.train import fit_and_export
from tests.support.tiny_runs import tiny_recipe

METHODS = ("sft", "bss", "rac", "bss+rac")
ADAPTERS = ("none", "lora")
STAGES = (0, 1, 2, 3)


def case_name(method: str, adapter: str, stage: int) -> str:
    return f"{method}-{adapter}-zero{stage}"


def train_case(method: str, adapter: str, stage: int):
    def case(world: World, folder: Path) -> dict:
        name = case_name(method, adapter, stage)
        recipe = tiny_recipe(
            folder,
            folder / f"ranks{world.size}" / name,
            method__name=method,
            adapter__kind=adapter,
            adapter__rank=4,
            deepspeed=f"ds_configs/zero{stage}.json",
        )
        torch.manual_seed(world.rank)  # nothing may depend on the global generator
        fit_and_export(recipe, world)
        lines = Path(recipe.output_dir, "metrics.jsonl").read_text().splitlines()
        return {"rows": [json.loads(line) for line in lines]}

    return case


CASES = {
    case_name(method, adapter, stage): train_case(method, adapter, stage)
    for method in METHODS
    for adapter in ADAPTERS
    for stage in STAGES
}

"""Packing, token budgets and automatic micro batches on this many ranks: the cases of `test_throughput.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ssgen_ds.distributed import World
from ssgen_ds.train import fit_and_export
from tests.distributed.numerics_cases import Case, fresh, metrics_of, trainer_for
from tests.distributed.recovery_cases import refusal

STAGES = (0, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"data__packing": True},
    "budget": {"train__micro_batch_tokens": 60},
    "packed-budget": {"data__packing": True, "train__micro_batch": 6, "train__micro_batch_tokens": 100},
    "packed-checkpointing": {"data__packing": True, "model__gradient_checkpointing": True},
    "auto": {"train__micro_batch": "auto"},
}


def train_case(variant: str, stage: int) -> Case:
    def case(world: World, folder: Path) -> dict[str, Any]:
        settings = {"method__name": "bss+rac", "deepspeed": f"ds_configs/zero{stage}.json", **VARIANTS[variant]}
        recipe = fresh(folder, f"{variant}-{stage}", world, **settings)
        torch.manual_seed(world.rank)
        fit_and_export(recipe, world)
        return {"rows": metrics_of(Path(recipe.output_dir))}

    return case


def auto_case(world: World, folder: Path) -> dict[str, Any]:
    """What is chosen with plenty of memory, with room for two on one rank only, and with none; nothing is left over."""
    settings = {"deepspeed": "ds_configs/zero3.json", "train__micro_batch": "auto"}
    recipe = fresh(folder, "choice", world, **settings)
    chosen = [trainer_for(recipe, world).packing.sequences]
    with mock.patch("ssgen_ds.micro_batch.free_bytes", return_value=6e5 if world.rank else 1e12):
        chosen.append(trainer_for(fresh(folder, "choice", world, **settings), world).packing.sequences)
    with mock.patch("ssgen_ds.micro_batch.free_bytes", return_value=1e4 if world.rank else 1e12):
        refused = refusal(fresh(folder, "choice", world, **settings), world)
    return {"chosen": world.gather(chosen), "refused": refused}


def offload_case(world: World, folder: Path) -> dict[str, Any]:
    """What a run is refused with whose second rank has no host memory for what is offloaded; nothing is loaded."""
    settings = {"deepspeed": "ds_configs/zero3_offload.json"}
    with (
        mock.patch("ssgen_ds.build.host_bytes", return_value=1e4 if world.rank else 1e12),
        mock.patch("ssgen_ds.build.load_model") as load,
    ):
        message = refusal(fresh(folder, "offload-refused", world, **settings), world)
    return {"refused": message, "loaded": load.called}


def out_of_memory_case(world: World, folder: Path) -> str:
    """What a run is ended with whose first forward asks for more than there is."""
    recipe = fresh(folder, "out-of-memory", world, deepspeed="ds_configs/zero2.json")
    with mock.patch("ssgen_ds.step.token_loss", side_effect=lambda *_, **__: torch.empty(2**50)):
        return refusal(recipe, world)


def memory_case(world: World, folder: Path) -> list[dict[str, Any]]:
    """The rows as they are logged, peaks included."""
    recipe = fresh(folder, "memory", world, method__name="bss", deepspeed="ds_configs/zero2.json")
    fit_and_export(recipe, world)
    return [json.loads(line) for line in Path(recipe.output_dir, "metrics.jsonl").read_text().splitlines()]


CASES = {
    **{f"{variant}-{stage}": train_case(variant, stage) for variant in VARIANTS for stage in STAGES},
    "auto": auto_case,
    "offload": offload_case,
    "out-of-memory": out_of_memory_case,
    "memory": memory_case,
}

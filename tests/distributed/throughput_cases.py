"""Packing, token budgets and automatic micro batches on this many ranks: the cases of `test_throughput.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ssgen_ds.distributed import World
from ssgen_ds.step import train_step
from ssgen_ds.train import fit_and_export
from ssgen_ds.window import Packing, Sequence, build_window
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


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}  # what a host waits for a GPU in


def waits_case(stage: int) -> Case:
    """How often a whole optimizer step reads something from the device: of one micro batch, and of three."""

    def case(world: World, folder: Path) -> list[int]:
        settings = {"deepspeed": f"ds_configs/zero{stage}.json", "data__packing": True}
        engine = trainer_for(fresh(folder, f"waits-{stage}", world, **settings), world).engine
        sequences = [Sequence([5, 6, 7, 8, 9 + i], [-100, -100, 7, 8, 9]) for i in range(3 * world.size)]
        counts = []
        for most in (3, 1):
            window = build_window(sequences, Packing(most, None, True), world.rank, world.size, world.device)
            train_step(engine, window, 1e-3, world)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                train_step(engine, window, 1e-3, world)
            counts.append(sum(event.count for event in profile.key_averages() if event.key in WAITS))
        return counts

    return case


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
    **{f"waits-{stage}": waits_case(stage) for stage in STAGES},
    "offload": offload_case,
    "out-of-memory": out_of_memory_case,
    "memory": memory_case,
}

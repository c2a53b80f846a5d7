"""Quantised bases, 8-bit optimizers and float32 adapters on two ranks, at every ZeRO stage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssgen_ds.modeling.nf4 import nf4_layers
from tests.support.rank_runs import (
    PARTITIONED,
    STAGES,
    assert_interrupted_equals_uninterrupted,
    column,
    fresh,
    rows_of,
    tokens_of,
    trained,
    trainer_for,
    zero,
)
from tests.support.ranks import ranks

QLORA: dict[str, Any] = {"adapter__kind": "lora", "quantization__kind": "nf4", "method__name": "bss+rac"}


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


@ranks(1, 2)
@pytest.mark.parametrize("stage", STAGES)
def test_qlora_trains_the_same_at_every_stage(world, folder, kept, stage):
    """ZeRO-3 quantises shard by shard what the other stages, and one process, quantise whole."""
    deepspeed = zero(0 if world.size == 1 else stage)
    torch.manual_seed(world.rank)  # nothing may depend on the global generator
    run = trained(fresh(folder, "nf4", world, deepspeed=deepspeed, **QLORA), world)
    if world.size == 1:
        kept["rows"], kept["tokens"] = rows_of(run), tokens_of(run)
        return
    rows = rows_of(run)
    for row, expected in zip(rows, kept["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert tokens_of(run) == kept["tokens"]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    names = {name.rpartition(".lora_")[2] for name in adapter_of(run)}
    assert names == {"A.weight", "B.weight"}, "the adapter alone is saved"


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_half_a_byte_a_weight_or_its_share_of_that(world, folder, stage):
    """ZeRO 0 to 2 keep the frozen base whole on every rank; at 3 it is halved on two, and no rank has it whole."""
    deepspeed = PARTITIONED if stage == 3 else zero(stage)
    layers = nf4_layers(trainer_for(fresh(folder, "share", world, deepspeed=deepspeed, **QLORA), world).engine.module)
    codes = [layer.weight for layer in layers]
    held = sum((p.ds_tensor if stage == 3 else p).numel() * p.element_size() for p in codes)
    alive = sum(p.numel() * p.element_size() for p in codes)
    whole = sum(math.prod(layer.weight.quant_state.shape) for layer in layers) // 2
    assert world.gather(held) == [whole // 2 if stage == 3 else whole] * 2
    assert world.gather(alive) == [0 if stage == 3 else whole] * 2


NF4 = {"quantization__kind": "nf4"}
MOMENTS = {"train__optimizer": "adamw_8bit"}


@ranks(2)
@pytest.mark.parametrize(
    ("adapter", "stage", "method", "more"),
    [
        *(pytest.param("lora", stage, "bss+rac", NF4, id=f"nf4-zero{stage}") for stage in (0, 2, 3)),
        *(pytest.param("none", stage, "bss", MOMENTS, id=f"8bit-zero{stage}") for stage in STAGES),
        pytest.param("lora", 2, "rac", NF4 | {"train__optimizer": "paged_adamw_8bit"}, id="paged"),
    ],
)
def test_interrupted_equals_uninterrupted(world, folder, adapter, stage, method, more):
    """Stopped after every step; the quantised base is made again, 8-bit moments are read back to the bit."""
    assert_interrupted_equals_uninterrupted(world, folder, adapter, stage, method, **more)


@pytest.fixture(scope="module")
def float32_adapter(world, folder) -> Callable[[int], Path]:
    """The run of a float32 adapter on a bfloat16 base, by ZeRO stage."""

    @functools.cache
    def train(stage: int) -> Path:
        settings = {"adapter__kind": "lora", "adapter__dtype": "float32", "model__dtype": "bfloat16"}
        torch.manual_seed(world.rank)
        return trained(fresh(folder, f"float32-adapter-zero{stage}", world, deepspeed=zero(stage), **settings), world)

    return train


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_float32_adapters_train_on_a_bfloat16_base(float32_adapter, stage):
    run = float32_adapter(stage)
    assert {value.dtype for value in adapter_of(run).values()} == {torch.float32}
    losses = column(run, "loss")
    assert losses == pytest.approx(column(float32_adapter(0), "loss"), rel=2e-3)
    assert losses[-1] < 0.9 * losses[0]

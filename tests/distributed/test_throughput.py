"""However the micro batches are cut, the same run comes out; what is chosen is agreed; peaks are logged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.training.step import train_step
from tests.support.rank_runs import fresh, metrics_of, refusal, rows_of, tokens_of, trained, trainer_for, zero
from tests.support.ranks import ranks

STAGES = (0, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {"data__packing": True},
    "budget": {"train__micro_batch_tokens": 60},
    "packed-budget": {"data__packing": True, "train__micro_batch": 6, "train__micro_batch_tokens": 100},
    "packed-checkpointing": {"data__packing": True, "model__gradient_checkpointing": True},
    "auto": {"train__micro_batch": "auto"},
}


@pytest.fixture(scope="module")
def run_of(world, folder) -> Callable[[str, int], Path]:
    """The run of a variant, or of plain padding, at a ZeRO stage."""

    @functools.cache
    def train(variant: str, stage: int) -> Path:
        settings = {"method__name": "bss+rac", "deepspeed": zero(stage), **VARIANTS.get(variant, {})}
        torch.manual_seed(world.rank)
        return trained(fresh(folder, f"{variant}-{stage}", world, **settings), world)

    return train


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cut_of_the_micro_batches_changes_nothing(run_of, variant, stage):
    run, padded = run_of(variant, stage), run_of("padded", stage)
    for row, expected in zip(metrics_of(run), metrics_of(padded), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["num_tokens"] == expected["num_tokens"]
    assert tokens_of(run) == tokens_of(padded)


@ranks(2)
def test_the_rank_with_the_least_memory_decides_and_none_is_refused_on_all(world, folder):
    """Plenty of memory, room for two on one rank only, and none there; nothing is left over."""
    settings = {"deepspeed": zero(3), "train__micro_batch": "auto"}

    def free(on_rank_1: float) -> Any:
        there = on_rank_1 if world.rank else 1e12
        return mock.patch("ssgen_ds.training.micro_batch.free_bytes", return_value=there)

    plenty = trainer_for(fresh(folder, "choice", world, **settings), world).packing.sequences
    with free(6e5):
        little = trainer_for(fresh(folder, "choice", world, **settings), world).packing.sequences
    with free(1e4):
        refused = refusal(fresh(folder, "choice", world, **settings), world)
    assert world.gather([plenty, little]) == [[plenty, little]] * 2
    assert plenty == 3, "all of a rank's share of the global batch"
    assert 1 <= little < plenty
    assert "train.micro_batch: not even one fits: a sequence of" in refused
    assert "model.gradient_checkpointing=true" in refused


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}  # what a host waits for a GPU in


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_only_the_end_of_a_step_waits_for_the_device(world, folder, stage):
    """DeepSpeed's update and our two numbers of a step: the same count however many micro batches there are."""
    recipe = fresh(folder, f"waits-{stage}", world, deepspeed=zero(stage), data__packing=True)
    engine = trainer_for(recipe, world).engine
    sequences = [Sequence([5, 6, 7, 8, 9 + i], [-100, -100, 7, 8, 9]) for i in range(3 * world.size)]

    def waits(micro_batch: int) -> int:
        window = build_window(sequences, Packing(micro_batch, None, True), world.rank, world.size, world.device)
        train_step(engine, window, 1e-3, world)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_step(engine, window, 1e-3, world)
        return sum(event.count for event in profile.key_averages() if event.key in WAITS)

    one, three = waits(3), waits(1)
    assert 0 < three <= one


@ranks(2)
def test_a_step_that_does_not_fit_is_one_message_with_what_would(world, folder):
    """Its first forward asks for more than there is."""
    recipe = fresh(folder, "out-of-memory", world, deepspeed=zero(2))
    with mock.patch("ssgen_ds.training.step.token_loss", side_effect=lambda *_, **__: torch.empty(2**50)):
        message = refusal(recipe, world)
    assert message.startswith("out of memory in forward: ") and "\n" not in message
    assert "train.micro_batch" in message and "model.gradient_checkpointing=true" in message


@ranks(2)
def test_offloading_without_memory_is_refused_before_weights_load(world, folder):
    """The second rank has no host memory for what is offloaded."""
    recipe = fresh(folder, "offload-refused", world, deepspeed="ds_configs/zero3_offload.json")
    with (
        mock.patch("ssgen_ds.training.foundations.host_bytes", return_value=1e4 if world.rank else 1e12),
        mock.patch("ssgen_ds.training.build.load_model") as load,
    ):
        message = refusal(recipe, world)
    assert message.startswith("deepspeed: ds_configs/zero3_offload.json keeps ")
    assert not load.called


@ranks(2)
def test_peaks_are_logged_by_phase(world, folder):
    rows = rows_of(trained(fresh(folder, "memory", world, method__name="bss", deepspeed=zero(2)), world))
    for row in rows:
        assert 0 < row["peak_train_bytes"] <= row["peak_memory_bytes"]
        assert 0 < row["peak_optimizer_bytes"] <= row["peak_memory_bytes"]
    assert [row["peak_generate_bytes"] > 0 for row in rows] == [True, False, True, False]  # two steps a round

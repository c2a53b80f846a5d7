"""`selfgen.reuse`: the passes that sample are the training forward, and the run is that of sampling first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import safe_get_full_grad

from ssgen_ds.data.window import build_window
from ssgen_ds.training.step import accumulate_gradients
from tests.support.rank_runs import (
    assert_interrupted_equals_uninterrupted,
    column,
    fresh,
    refusal,
    rows_of,
    tokens_of,
    trained,
    trainer_for,
    weights_hash,
    zero,
)
from tests.support.ranks import ranks

REUSE = {
    "method__name": "bss",
    "data__packing": True,
    "model__gradient_checkpointing": True,
    "selfgen__refresh_every": 1,
}


def run_of(world: Any, folder: Path, reuse: str, **settings: Any) -> Path:
    return trained(fresh(folder, f"reuse-{reuse}", world, selfgen__reuse=reuse, **{**REUSE, **settings}), world)


@ranks(1, 2)
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_is_that_of_sampling_first(world, folder, stage, adapter):
    settings = {"deepspeed": zero(stage), "adapter__kind": adapter}
    first, one = (run_of(world, folder, reuse, **settings) for reuse in ("off", "on"))
    assert tokens_of(one) == tokens_of(first)
    for row, expected in zip(rows_of(one), rows_of(first), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        for key in ("sampled_token_share", "num_tokens", "selfgen_passes", "mix_rate"):
            assert row[key] == expected[key], key


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_gradients_are_those_of_sampling_first(world, folder, stage, rate):
    """1e-5 of their norm, of micro batches on two ranks."""
    found = []
    for reuse in ("off", "on"):
        settings = {"deepspeed": zero(stage), "method__bss__mix_rate": rate, "train__micro_batch": 1}
        recipe = fresh(folder, "gradients", world, selfgen__reuse=reuse, **{**REUSE, **settings})
        trainer = trainer_for(recipe, world)
        opened = trainer.rounds.at(1)
        pairs = zip(opened.slots[1], opened.records[1], strict=True)
        sequences = [sequence for slot, record in pairs for sequence in trainer.generator.sequences(slot, record)]
        window = build_window(sequences, trainer.packing, world.rank, world.size, world.device)
        replays = None if trainer.one_forward is None else trainer.one_forward.replays(window)
        assert (replays is not None) == (reuse == "on")
        accumulate_gradients(trainer.engine, window, world, replays)
        named = trainer.engine.module.named_parameters()
        found.append({name: safe_get_full_grad(value).double() for name, value in named})
    first, one = found
    difference = sum((one[name] - first[name]).square().sum() for name in first)
    assert (difference / sum(value.square().sum() for value in first.values())).sqrt() < 1e-5


@ranks(2)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_interrupted_equals_uninterrupted(world, folder, adapter):
    """Each step's recording is made anew after a resume."""
    more = {key: value for key, value in REUSE.items() if key != "method__name"}
    settings = {**more, "selfgen__reuse": "on", "adapter__dropout": 0.0}
    assert_interrupted_equals_uninterrupted(world, folder, adapter, 2, "bss", **settings)


@ranks(2)
def test_at_a_mix_rate_of_zero_it_is_sft_bit_for_bit(world, folder):
    off = run_of(world, folder, "on", method__bss__mix_rate=0.0, deepspeed=zero(1))
    sft = trained(fresh(folder, "sft", world, **{**REUSE, "method__name": "sft", "deepspeed": zero(1)}), world)
    assert weights_hash(off) == weights_hash(sft)


@ranks(2)
def test_a_schedule_that_begins_at_zero_goes_over_to_it(world, folder):
    settings = {"method__bss__schedule": "linear", "method__bss__mix_rate": 0.8}
    first, one = (run_of(world, folder, reuse, **settings) for reuse in ("off", "on"))
    assert column(one, "mix_rate")[0] == 0.0 < column(one, "mix_rate")[-1]
    assert column(one, "loss") == pytest.approx(column(first, "loss"), rel=1e-5)


@ranks(1)
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "the passes that sample are the training forward"),
        ({"method__name": "bss+rac"}, "drafts and corrections are not recorded"),
        ({"selfgen__refresh_every": 2}, "selfgen.refresh_every=2: weights change"),
        ({"model__gradient_checkpointing": False}, "model.gradient_checkpointing=false: "),
        ({"data__packing": False}, "data.packing=false: "),
        ({"deepspeed": zero(3)}, "ZeRO-3 follows the modules of a forward"),
    ],
)
def test_auto_says_what_it_does_and_why(world, folder, settings, why, capsys):
    recipe = fresh(folder, "auto", world, **{**REUSE, **settings})
    trainer = trainer_for(recipe, world)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("selfgen.reuse: ")]
    assert line.removeprefix("selfgen.reuse: ").startswith(why)
    assert (trainer.one_forward is None) == bool(settings)


@ranks(1)
def test_on_is_refused_where_it_cannot_be(world, folder):
    recipe = fresh(folder, "refused", world, selfgen__reuse="on", **{**REUSE, "data__packing": False})
    assert "selfgen.reuse=on: data.packing=false: the step pads its rows; set selfgen.reuse=auto" in refusal(
        recipe, world
    )

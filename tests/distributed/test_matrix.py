"""All methods x adapters x ZeRO stages on two ranks, against each other and against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.rank_runs import STAGES, column, fresh, rows_of, tokens_of, trained, zero
from tests.support.ranks import ranks

METHODS = ("sft", "bss", "rac", "bss+rac")
ADAPTERS = ("none", "lora")
Train = Callable[[str, str, int], Path]


@pytest.fixture(scope="module")
def run_of(world, folder) -> Train:
    """Trains a method, adapter and ZeRO stage once, on these ranks; the run folder."""

    @functools.cache
    def train(method: str, adapter: str, stage: int) -> Path:
        settings = {"method__name": method, "adapter__kind": adapter, "deepspeed": zero(stage)}
        recipe = fresh(folder, f"{method}-{adapter}-zero{stage}", world, **settings)
        torch.manual_seed(world.rank)  # nothing may depend on the global generator
        return trained(recipe, world)

    return train


@ranks(1, 2)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_stage_trains_the_same(world, run_of, kept, method, adapter):
    """Same losses at every ZeRO stage on two ranks and on one process; the same generated tokens, bit for bit."""
    if world.size == 1:
        alone = run_of(method, adapter, 0)
        kept["rows"], kept["tokens"] = rows_of(alone), tokens_of(alone)
        assert column(alone, "step") == [1, 2, 3, 4]
        assert len(kept["tokens"]) == (0 if method == "sft" else 2)
        return
    for stage in STAGES:
        run = run_of(method, adapter, stage)
        for row, expected in zip(rows_of(run), kept["rows"], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            for key in ("mix_rate", "sampled_token_share", "num_tokens", "selfgen_passes", "epoch", "round", "lr"):
                assert row[key] == expected[key], key
        assert tokens_of(run) == kept["tokens"]


@ranks(2)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns(run_of, method):
    losses = column(run_of(method, "none", 3), "loss")
    assert losses[-1] < 0.8 * losses[0]


@ranks(2)
def test_methods_differ(run_of):
    """Each method trains on something else: no two have the same first loss."""
    assert len({round(column(run_of(method, "none", 2), "loss")[0], 4) for method in METHODS}) == 4


@ranks(2)
def test_the_records_are_what_the_method_says(run_of):
    """Coins where mixed, gold elsewhere; drafts within their length; corrections for non-empty drafts only."""
    records = [record for group in tokens_of(run_of("bss+rac", "none", 3)) for record in group]
    assert len(records) == 4 * 6
    flipped = 0
    for record in records:
        assert len(record.mixed.coins) == len(record.mixed.ids) == len(record.gold_ids)
        assert not record.mixed.coins[-1]
        for coin, mixed, gold in zip(record.mixed.coins, record.mixed.ids, record.gold_ids, strict=True):
            assert coin or mixed == gold
            flipped += mixed != gold
        assert len(record.draft.ids) <= 8
        assert (record.target is not None) == bool(record.draft.ids)
        assert record.target is None or record.target.ids == record.gold_ids
    assert flipped > 0
    coins = [coin for record in records for coin in record.mixed.coins[:-1]]
    assert 0.2 < sum(coins) / len(coins) < 0.4  # mix_rate 0.3

"""All methods x adapters x ZeRO stages on two ranks, against each other and against one process."""

import pytest

from tests.distributed.matrix_cases import ADAPTERS, METHODS, STAGES, case_name
from tests.distributed.numerics_cases import tokens_of

MODULE = "tests.distributed.matrix_cases"
COMBINATIONS = [(method, adapter) for method in METHODS for adapter in ADAPTERS]


@pytest.mark.parametrize(("method", "adapter"), COMBINATIONS)
def test_every_stage_trains_the_same(run_cases, inputs, method, adapter):
    """Same losses at every ZeRO stage on two ranks and on one process; the same generated tokens, bit for bit."""
    two, one = run_cases(MODULE, 2), run_cases(MODULE, 1)
    reference = one[case_name(method, adapter, 0)]["rows"]
    assert [row["step"] for row in reference] == [1, 2, 3, 4]
    for stage in STAGES:
        rows = two[case_name(method, adapter, stage)]["rows"]
        for row, expected in zip(rows, reference, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            for key in ("mix_rate", "sampled_token_share", "num_tokens", "selfgen_passes", "epoch", "round", "lr"):
                assert row[key] == expected[key], key
        name = case_name(method, adapter, stage)
        tokens = [tokens_of(inputs / f"ranks{ranks}" / case) for ranks, case in ((2, name), (1, name))]
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == (0 if method == "sft" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(run_cases, method):
    rows = run_cases(MODULE, 2)[case_name(method, "none", 3)]["rows"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_methods_differ(run_cases):
    """Each method trains on something else: no two have the same first loss."""
    results = run_cases(MODULE, 2)
    assert len({round(results[case_name(method, "none", 2)]["rows"][0]["loss"], 4) for method in METHODS}) == 4


def test_the_records_are_what_the_method_says(run_cases, inputs):
    """Coins where mixed, gold elsewhere; drafts within their length; corrections for non-empty drafts only."""
    run_cases(MODULE, 2)
    records = [r for group in tokens_of(inputs / "ranks2" / case_name("bss+rac", "none", 3)) for r in group]
    assert len(records) == 4 * 6
    flipped = 0
    for record in records:
        assert len(record.coins) == len(record.mixed_ids) == len(record.gold_ids)
        assert not record.coins[-1]
        for coin, mixed, gold in zip(record.coins, record.mixed_ids, record.gold_ids, strict=True):
            assert coin or mixed == gold
            flipped += mixed != gold
        assert len(record.draft_ids) <= 8
        assert (record.target_ids is not None) == bool(record.draft_ids)
        assert record.target_ids in (None, record.gold_ids)
    assert flipped > 0
    coins = [coin for record in records for coin in record.coins[:-1]]
    assert 0.2 < sum(coins) / len(coins) < 0.4  # mix_rate 0.3

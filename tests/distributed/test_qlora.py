"""Quantised bases, 8-bit optimizers and float32 adapters on two ranks, at every ZeRO stage."""

import pytest

from tests.distributed.numerics_cases import tokens_of
from tests.distributed.qlora_cases import CASES, STAGES

MODULE = "tests.distributed.qlora_cases"
RESUMED = [name for name in CASES if name.startswith("resume-")]


@pytest.fixture(scope="module")
def two(run_cases):
    return run_cases(MODULE, 2)


@pytest.fixture(scope="module")
def one(run_cases):
    return run_cases("tests.distributed.qlora_single_cases", 1)


@pytest.mark.parametrize("stage", STAGES)
def test_qlora_trains_the_same_at_every_stage(one, two, inputs, stage):
    """ZeRO-3 quantises shard by shard what the other stages, and one process, quantise whole."""
    wanted, found = one["nf4-zero0"], two[f"nf4-zero{stage}"]
    for row, expected in zip(found["rows"], wanted["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    name = f"nf4-zero{stage}"
    assert tokens_of(inputs / "ranks2" / name) == tokens_of(inputs / "ranks1" / "nf4-zero0")
    assert found["rows"][-1]["loss"] < 0.9 * found["rows"][0]["loss"]
    assert found["names"] == ["A.weight", "B.weight"], "the adapter alone is saved"


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_half_a_byte_a_weight_or_its_share_of_that(two, stage):
    """ZeRO 0 to 2 keep the frozen base whole on every rank; at 3 it is halved on two, and no rank has it whole."""
    share = two[f"share-{stage}"]
    whole = share["weights"] // 2
    assert share["held"] == [whole // 2 if stage == 3 else whole] * 2
    assert share["alive"] == [0 if stage == 3 else whole] * 2


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_equals_uninterrupted(two, name):
    """Stopped after every step; the quantised base is made anew, 8-bit moments are read back to the bit."""
    result = two[name]
    assert result["stops"] == 4
    assert result["same_weights"] and result["same_tokens"] and result["same_metrics"]


@pytest.mark.parametrize("stage", STAGES)
def test_float32_adapters_train_on_a_bfloat16_base(two, stage):
    result = two[f"float32-adapter-zero{stage}"]
    assert result["dtypes"] == ["float32"]
    losses = [row["loss"] for row in result["rows"]]
    reference = [row["loss"] for row in two["float32-adapter-zero0"]["rows"]]
    assert losses == pytest.approx(reference, rel=2e-3)
    assert losses[-1] < 0.9 * losses[0]

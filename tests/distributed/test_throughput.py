"""However the micro batches are cut, the same run comes out; what is chosen is agreed; peaks are logged."""

import pytest

from tests.distributed.numerics_cases import tokens_of
from tests.distributed.throughput_cases import STAGES, VARIANTS


@pytest.fixture(scope="module")
def results(run_cases):
    return run_cases("tests.distributed.throughput_cases", 2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "padded"])
def test_the_cut_of_the_micro_batches_changes_nothing(results, inputs, variant, stage):
    rows, wanted = results[f"{variant}-{stage}"]["rows"], results[f"padded-{stage}"]["rows"]
    for row, expected in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["num_tokens"] == expected["num_tokens"]
    assert tokens_of(inputs / "ranks2" / f"{variant}-{stage}") == tokens_of(inputs / "ranks2" / f"padded-{stage}")


def test_the_rank_with_the_least_memory_decides_and_none_is_refused_on_all(results):
    result = results["auto"]
    plenty, little = result["chosen"][0]
    assert result["chosen"] == [[plenty, little]] * 2
    assert plenty == 3, "all of a rank's share of the global batch"
    assert 1 <= little < plenty
    assert "train.micro_batch: not even one fits: a sequence of" in result["refused"]
    assert "model.gradient_checkpointing=true" in result["refused"]


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_end_of_a_step_waits_for_the_device(results, stage):
    """DeepSpeed's update and our two numbers of a step: the same count however many micro batches there are."""
    one, three = results[f"waits-{stage}"]
    assert 0 < three <= one


def test_a_step_that_does_not_fit_is_one_message_with_what_would(results):
    message = results["out-of-memory"]
    assert message.startswith("out of memory in forward: ") and "\n" not in message
    assert "train.micro_batch" in message and "model.gradient_checkpointing=true" in message


def test_offloading_without_memory_is_refused_before_weights_load(results):
    assert results["offload"]["refused"].startswith("deepspeed: ds_configs/zero3_offload.json keeps ")
    assert not results["offload"]["loaded"]


def test_peaks_are_logged_by_phase(results):
    rows = results["memory"]
    for row in rows:
        assert 0 < row["peak_train_bytes"] <= row["peak_memory_bytes"]
        assert 0 < row["peak_optimizer_bytes"] <= row["peak_memory_bytes"]
    assert [row["peak_generate_bytes"] > 0 for row in rows] == [True, False, True, False]  # two steps a round

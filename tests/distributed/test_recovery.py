"""F6 to F9 and F12 on real ranks: broken files, full disks, NaN and other numbers of ranks."""

import re

import pytest

from tests.distributed.recovery_cases import RESHARDED
from tests.support.damage import DAMAGE


@pytest.fixture(scope="module")
def before(run_cases):
    return run_cases("tests.distributed.recovery_before_cases", 1)


@pytest.fixture(scope="module")
def results(run_cases, before):
    return run_cases("tests.distributed.recovery_cases", 2)


@pytest.fixture(scope="module")
def after(run_cases, results):
    return run_cases("tests.distributed.recovery_after_cases", 1)


NAMED = {
    "truncated": r"shard-00001-of-00002.safetensors: \d+ bytes instead of \d+ \(truncated\)",
    "flipped": r"shard-00000-of-00002.safetensors: its content has changed \(SHA-256 differs\)",
    "shard-missing": "shard-00001-of-00002.safetensors: missing",
    "marker-empty": "COMPLETE: unreadable",
    "marker-missing": "COMPLETE: missing, so the checkpoint is not complete",
    "index-changed": "index.json: 2 bytes instead of",
    "round-missing": "round.parquet: missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(results, damage):
    """F6; and F8: rank 1 sees no checkpoint at all."""
    result = results["damage"][damage]
    broken, used = result["said"]
    assert re.search(NAMED[damage], broken)
    assert "step-00000003 is broken" in broken
    assert used.startswith("going on from") and used.endswith("step-00000002")
    assert result["same"]
    assert result["checkpoints"] == ["broken-step-00000003", *(f"step-0000000{step}" for step in (1, 2, 3, 4))]


def test_step_0_is_never_a_fallback(results):
    result = results["damage"]["all"]
    assert result["unchanged"]
    assert "can be used; nothing was changed" in result["refused"]
    for part in ("step-00000003", "step-00000002", "step-00000001"):
        assert part in result["refused"]


@pytest.mark.parametrize(("case", "error"), [("shard", "No space left on device"), ("publish", "Permission denied")])
def test_a_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(results, case, error):
    """F7."""
    result = results[f"disk-{case}"]
    assert "the checkpoint of step 4 was not written" in result["refused"]
    assert f"rank {1 if case == 'shard' else 0} on " in result["refused"] and error in result["refused"]
    assert "step-00000002 is complete" in result["refused"]
    assert result["left"] == ["step-00000002"]
    assert result["same"] and result["steps"] == [1, 2, 3, 4]


def test_a_model_that_cannot_be_written_costs_nothing_but_another_start(results):
    """F7."""
    result = results["disk-model"]
    assert "the trained model was not written; step 4, the last, is in the newest checkpoint" in result["refused"]
    assert "rank 0 on " in result["refused"] and "No space left on device" in result["refused"]
    assert result["left"][-1] == "step-00000004"
    assert result["same"] and result["steps"] == [1, 2, 3, 4]


def test_updates_left_out_are_counted_over_restarts_and_too_many_in_a_row_end_the_run(results):
    """F9."""
    result = results["skipping"]
    assert result["losses"] == [False, True, True, False, False]
    assert result["skipped"] == [0, 1, 2, 2, 2]
    assert result["same"], "stopped after every step and continued: the same run"
    first, second = result["message"]
    assert first == second
    assert first.startswith("step 3: the loss is not finite, the update was left out (2 in a row)")
    assert "row-" in first
    assert result["last_attempt"]["outcome"] == "failed" and first in result["last_attempt"]["reason"]
    assert result["checkpoints"] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("case", ["0-auto", "3-sharded", "3-gathered"])
def test_logits_that_are_not_finite_end_the_run_on_all_ranks(results, case):
    """F9."""
    assert results[f"logits-{case}"].startswith("generation on rank 1: the logits at response position ")


@pytest.mark.parametrize("name", RESHARDED)
@pytest.mark.parametrize("origin", [1, 2])
def test_another_number_of_ranks_goes_on_with_the_same_examples_and_noise(results, after, name, origin):
    """F12: from `origin` ranks to the other number, against two ranks throughout."""
    result = {1: results, 2: after}[origin][f"take-{name}"]
    assert result["steps"] == [1, 2, 3, 4, 5, 6]
    assert result["loss"] < (0.05 if name == "8bit" else 1e-5)
    assert result["same_tokens"] or name == "8bit"  # other blocks, other rounding
    assert f"with ranks {origin}, now {3 - origin}" in result["said"][0]
    assert len(result["said"]) == (2 if name == "cross" else 1)


def test_other_inputs_are_refused_and_other_versions_are_said(results):
    messages = results["changed-inputs"]
    assert "was trained with another data (fingerprint" in messages["data"]
    assert "was trained with another tokenizer (fingerprint" in messages["tokenizer"]
    assert "was written with torch 2." in messages["version"] and "now 0.0" in messages["version"]


def test_a_folder_that_the_nodes_do_not_share_is_refused_on_all_ranks(results):
    first, second = results["unshared"]  # and nothing is left of it
    assert first == second
    assert first.startswith("output_dir: rank 1 on ") and "put it on a file system that all nodes share" in first


def test_a_lora_checkpoint_holds_the_adapter_and_nothing_else(results):
    result = results["adapter-only"]
    assert result["problems"] == []
    assert result["names"] and all(".lora_" in name for name in result["names"])
    assert {name.partition(":")[0] for name in result["names"]} == {"weight", "exp_avg", "exp_avg_sq"}
    assert result["size"] == result["finished"]["checkpoint_bytes"]
    assert 0 < result["finished"]["checkpoint_seconds"] < 60


def test_an_offloaded_optimizer_goes_on_where_it_was(results):
    whole, cut = results["offload"]
    assert len(whole) == 4
    assert cut == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_interrupted_equals_uninterrupted_in_bfloat16(results, stage):
    result = results[f"bf16-{stage}"]
    assert result["stops"] == 4
    assert result["same_weights"] and result["same_tokens"] and result["same_metrics"]

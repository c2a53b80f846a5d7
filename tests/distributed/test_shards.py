"""Generation under ZeRO-3 on two real ranks, every parameter partitioned, in both strategies."""

import pytest

from tests.distributed.shard_cases import STRATEGIES


@pytest.fixture(scope="module")
def results(run_cases):
    return run_cases("tests.distributed.shard_cases", 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_generation_leaves_training_as_it_was(results, strategy, adapter):
    """With gradient checkpointing and dropout, to the bit."""
    result = results[f"trace-{strategy}-{adapter}"]
    assert result["with"] == result["without"]
    assert result["same_weights"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [1, 5])
def test_tokens_are_those_of_whole_parameters(results, strategy, number):
    assert results[f"uneven-{strategy}-{number}"] == results[f"uneven-local-{number}"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_and_partitions_come_back(results, strategy):
    """Also after an error in the middle of a forward."""
    result = results[f"parameters-{strategy}"]
    assert result["strategy"] == strategy
    assert result["before"] == result["after"] == result["after_error"] == ["NOT_AVAILABLE"]
    assert result["same_hooks"]
    assert result["caught"]
    assert result["same_hooks_after_error"]
    assert result["is_training"]
    assert result["same_tokens"]
    assert result["trains"]


def test_sharded_holds_one_layer_at_a_time(results):
    assert results["parameters-sharded"]["layers_whole"] == [[0], [1]]
    assert results["parameters-gathered"]["layers_whole"] == [[0, 1]]


def test_auto_block_is_agreed_measured_once_and_kept(results):
    result = results["auto-block"]
    assert result["chosen"][0] == result["chosen"][1]
    assert result["strategy"] == "gathered"  # a tiny model fits
    assert result["times"][0] == result["times"][1]
    assert any("measured when the run began" in line for line in result["lines"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gap_is_that_of_one_process(results, strategy):
    """Its own contexts and another model's; a stop that one rank is asked for ends it on all."""
    result = results[f"gap-{strategy}"]
    assert result["same_contexts"]
    assert result["largest_difference"] < 1e-4
    assert result["shared_differs"]
    assert result["digests"][0] == result["digests"][1]
    assert result["stopped"] == [True, True]
    assert result["statuses"] == ["NOT_AVAILABLE"]

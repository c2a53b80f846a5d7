"""Evaluation on two ranks: while training, over partitions, and after a stop."""

import pytest


@pytest.fixture(scope="module")
def results(run_cases):
    return run_cases("tests.distributed.evaluate_cases", 2)


def test_stopped_in_every_evaluation_is_the_same_run(results):
    """Each evaluation is made after the resume; weights, rows and every prediction are those of an undisturbed run."""
    result = results["training"]
    assert [stop.split(";")[0] for stop in result["stops"]] == [f"stopped on request at step {i}" for i in (1, 2, 3, 4)]
    names = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert result["evaluations"] == sorted(f"{name}{end}" for name in names for end in (".json", ".predictions.jsonl"))
    assert result["same_evaluations"] and result["same_weights"] and result["same_metrics"]


def test_the_best_checkpoint_is_kept_beside_the_newest(results):
    result = results["training"]
    best = 1 + result["losses"].index(min(result["losses"]))
    assert 1 <= best < 4, "the case is made so that the last step is not the best"
    for found, checkpoints in zip(result["best"], result["checkpoints"], strict=True):
        assert found == {"step": best, "metric": "loss", "value": min(result["losses"])}
        assert checkpoints == ["best.json", f"step-0000000{best}", "step-00000004"]


def test_answers_drawn_while_training_do_not_depend_on_the_ranks(results, run_cases):
    alone = run_cases("tests.distributed.single_cases", 1)["still"]
    assert results["still"] == alone and len(set(alone)) > 2


def test_a_partitioned_model_gives_the_answers_of_a_whole_one(results):
    result = results["partitioned"]
    assert result["same"] == result["models"]
    assert result["answers"] == 14
    assert result["distinct"] == 3, "the folder, the run trained in full, and the adapter differ"


def test_a_stopped_evaluation_goes_on_after_the_answers_it_has(results):
    result = results["stopped"]
    assert len(result["said"]) == 2 and all("of 26 prompts are answered" in text for text in result["said"])
    assert 0 < result["kept"] < 52 and not result["left"]
    assert result["same"]

"""The step, resume, generation on uneven ranks, faults, export and refusals, on two real ranks."""

import pytest
import torch

from tests.distributed.numerics_cases import STAGES

MODULE = "tests.distributed.numerics_cases"


@pytest.fixture(scope="module")
def results(run_cases):
    return run_cases(MODULE, 2)


@pytest.fixture(scope="module")
def alone(run_cases):
    return run_cases("tests.distributed.single_cases", 1)


def distance(path: str, reference: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the reference, over all parameters together."""
    gradients = torch.load(path)
    assert gradients.keys() == reference.keys()
    difference = sum((gradients[name] - reference[name]).double().square().sum() for name in reference)
    return float((difference / sum(value.double().square().sum() for value in reference.values())).sqrt())


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_do_not_depend_on_how_the_window_is_cut(results, alone, stage):
    """4 x 1 = 2 x 2 = 1 x 4 = two ranks, at every ZeRO stage: 1e-6 of the gradient's norm."""
    reference = torch.load(alone["gradient-0-4"])
    for micro_batch in (1, 2, 4):
        assert distance(alone[f"gradient-0-{micro_batch}"], reference) < 1e-6
        assert distance(results[f"gradient-{stage}-{micro_batch}"], reference) < 1e-6


@pytest.mark.parametrize("case", ["none-0", "none-1", "none-2", "none-3", "lora-2", "lora-3", "streaming"])
def test_interrupted_equals_uninterrupted(results, case):
    """Stopped after every step, mid-round included, and continued: weights, tokens and metrics bit for bit."""
    result = results[f"resume-{case}"]
    assert result["stops"] == 4
    assert result["same_weights"]
    assert result["same_tokens"]
    assert result["same_metrics"]
    assert result["checkpoints"] == ["step-00000004", "step-00000005"]  # keep: 2


@pytest.mark.parametrize("stage", [0, 3])
def test_earlier_visits_make_generation_cheaper_and_change_nothing_else(results, stage):
    """Nothing is trained (a vanishing rate), so in epoch 2 each guess is right: one pass; the same after restarts."""
    runs = results[f"visits-{stage}"]
    tokens = {name: [{**item, "bss_passes": None} for item in run["generated"]] for name, run in runs.items()}
    assert tokens["whole"] == tokens["cut"] == tokens["bare"]
    assert runs["whole"] == runs["cut"]
    costs = runs["whole"]["costs"]
    assert len(costs) == 4
    second = [item["bss_passes"] for item in runs["whole"]["generated"] if item["visit"] == 1 and any(item["coins"])]
    assert second
    assert set(second) == {1}
    assert max(item["bss_passes"] for item in runs["bare"]["generated"] if item["visit"] == 1) > 1
    calls = [cost["selfgen_calls"] for cost in costs]
    assert sum(calls[2:]) < sum(calls[:2])
    assert sum(calls[2:]) < sum(cost["selfgen_calls"] for cost in runs["bare"]["costs"][2:])


@pytest.mark.parametrize("method", ["bss", "rac"])
def test_a_method_at_rate_zero_is_sft_bit_for_bit(results, method):
    assert results[f"sft-{method}"] is True


@pytest.mark.parametrize("case", ["2-none", "2-lora", "3-none", "3-lora"])
def test_generation_leaves_training_as_it_was(results, case):
    result = results[f"trace-{case}"]
    assert result["with"] == result["without"]
    assert result["same_weights"]


@pytest.mark.parametrize("number", [1, 5])
def test_uneven_generation_ends_and_is_the_same_everywhere(results, alone, number):
    for stage in (0, 3):
        assert results[f"uneven-{stage}-{number}"] == alone[f"uneven-0-{number}"]
    assert len({len(tokens) for tokens in alone["uneven-0-5"]}) > 2, "the case must be uneven to mean anything"


def test_rewrites_are_the_same_on_two_sharded_ranks(results, alone):
    """Drafts, cuts, rewrites and targets of ZeRO-3 on two ranks are those of one process, bit for bit."""
    generated = results["rewrite-3"]
    assert generated == alone["rewrite-0"]
    assert len(generated) == 4 * 6
    drafted = [item for item in generated if item["draft_ids"]]
    assert drafted
    assert all(item["rewrite_ids"] is not None and item["target_ids"] for item in drafted)
    assert all(1 <= item["draft_kept"] <= len(item["draft_ids"]) for item in drafted)
    assert any(item["draft_kept"] < len(item["draft_ids"]) for item in drafted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_rank_leaves_the_update_out_on_all(results, stage, where, dtype):
    """F9. Weights stay as they were, and the next step is that of a run which never saw the NaN."""
    result = results[f"nan-{stage}-{where}-{dtype}"]
    assert result == {"skipped": [[True, True], [True, True]], "same_weights": True, "same_after": True}


@pytest.mark.parametrize("case", ["none-2", "none-3", "lora-2", "lora-3"])
def test_exported_model_gives_the_engines_logits(results, case):
    assert results[f"export-{case}"] < 1e-5


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("file", ["data.train: no such file: missing.jsonl"]),
        ("column", ["train.jsonl:1", "'answr'", "prompt, completion"]),
        ("empty", ["empty.jsonl"]),
        ("masked", ["train.jsonl:1", "response"]),
        ("model", ["model.path: ./no-such-model"]),
        ("context", ["data.max_prompt_tokens", "256 positions"]),
        ("ds", ["deepspeed: no such file", "zero3.json"]),
    ],
)
def test_bad_input_is_refused_on_all_ranks(results, case, parts):
    for part in parts:
        assert part in results[f"refused-{case}"]


def test_another_runs_folder_is_left_alone(results):
    messages = results["other-recipe"]
    assert "train.lr: 0.01 -> 0.5" in messages["changed"]
    assert "method.name: 'sft' -> 'bss'" in messages["changed"]
    assert "resume is never" in messages["never"]


def test_offloaded_training_is_that_of_the_gpu_resident(results):
    """ZeRO-3 with optimizer and parameters in host memory: DeepSpeed's own CPU Adam, equal to rounding."""
    assert results["offload"]["offloaded"] == pytest.approx(results["offload"]["resident"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bfloat16_trains_close_to_float32(results, adapter, stage):
    losses = results[f"bf16-{adapter}-{stage}"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"][-1] != losses["bfloat16"][0]
    assert all(isinstance(count, int) for count in losses["mismatches"])  # counted and shown, never an error


def test_weighted_mixture_of_conversations(results):
    """8 x 2 + 26 examples in windows of 6 are 7 steps an epoch, the last whole; evaluated every 4 and at the end."""
    result = results["mixture"]
    assert result["steps"] == 14
    assert result["epochs"] == [0] * 7 + [1] * 7
    assert [i + 1 for i, loss in enumerate(result["eval"]) if loss is not None] == [4, 8, 12, 14]
    losses = [loss for loss in result["eval"] if loss is not None]
    assert losses[-1] < losses[0]


def test_resume_from_a_named_checkpoint(results):
    """Step 4 only, from step 3's checkpoint in mid-round, in a folder of its own."""
    result = results["path"]
    assert result["steps"] == [4]
    assert result["same_weights"]
    assert "train.lr: 0.01 -> 0.5" in result["refused"]

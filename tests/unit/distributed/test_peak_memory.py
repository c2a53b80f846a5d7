"""Peaks by phase, and what is said when the memory does not suffice."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ssgen_ds.distributed import process_group as distributed
from ssgen_ds.distributed.peak_memory import PeakMemory
from ssgen_ds.distributed.watchdog import Watchdog
from ssgen_ds.errors import RankError


def test_peaks_are_kept_by_phase_and_given_once():
    memory = PeakMemory()
    with memory.of("backward"):
        held = torch.ones(2**24)
    with memory.of("forward"), memory.of("pass"):
        pass
    peaks = memory.take()
    assert peaks["train"] >= held.nbytes and peaks["generate"] == peaks["optimizer"] == 0
    assert memory.highest == peaks["train"]
    assert memory.take() == {"generate": 0, "train": 0, "optimizer": 0}


@pytest.mark.parametrize(
    ("phase", "fix"),
    [
        ("generate", "selfgen.batch"),
        ("forward", "model.gradient_checkpointing=true"),
        ("backward", "train.micro_batch"),
        ("optimizer", "train.optimizer=paged_adamw_8bit"),
        ("load", "quantization.kind=nf4"),
    ],
)
def test_memory_that_does_not_suffice_is_one_message_with_what_needs_less(phase, fix):
    with pytest.raises(RankError, match=rf"^out of memory in {phase}: ") as caught, PeakMemory().of(phase):
        torch.empty(2**50)
    message = str(caught.value)
    assert fix in message and "you tried to allocate" in message and "`ssgen plan`" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("outer", "inner", "fix"),
    [
        ("generate", "mixing", "lower selfgen.batch"),
        ("generate", "drafting", "lower selfgen.batch"),
        ("generate", "rewriting", "lower selfgen.batch"),
        ("evaluate", "pass", "lower train.micro_batch or selfgen.batch"),
        ("evaluate", "evaluate", "lower train.micro_batch or selfgen.batch"),
        ("start", "answer", "lower --batch"),
        ("start", "gap", "lower --batch"),
    ],
)
def test_what_runs_out_inside_a_phase_gets_the_advice_that_fits(outer, inner, fix):
    memory = PeakMemory()
    with pytest.raises(RankError, match=fix), memory.of(outer), memory.of(inner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 222.00 MiB.")


def test_a_gpus_own_exception_is_told_by_its_first_line():
    text = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.2 GiB.\nSee documentation"
    told = pytest.raises(RankError, match=r"^out of memory in backward: CUDA out of memory. Tried .* 79.2 GiB\. lower")
    with told, PeakMemory().of("train"), PeakMemory().of("backward"):
        raise torch.OutOfMemoryError(text)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes") as caught, PeakMemory().of("forward"):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, RankError)


def test_the_others_are_told_what_only_this_rank_knows(monkeypatch):
    """Instead of waiting for a rank that is gone until they give it up."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "join", lambda *_: SimpleNamespace(store=None, close=lambda: None))
    monkeypatch.setattr(distributed, "torch_store", lambda *_: None)
    monkeypatch.setattr(distributed, "_init_backend", lambda *_: None)
    with (
        mock.patch.dict("os.environ"),
        mock.patch.object(Watchdog, "fail") as fail,
        pytest.raises(RankError),
        distributed.process_group() as world,
        world.phase("backward", 3),
    ):
        torch.empty(2**50)
    (text,) = fail.call_args.args
    assert text.startswith("rank 0 on ") and "out of memory in backward" in text

"""How many sequences fit: on a CPU by two measurements of one, on a GPU by trying."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ssgen_ds.errors import UserError
from ssgen_ds.sampler.build import optimizer_bytes_to_come
from ssgen_ds.training import micro_batch
from ssgen_ds.training.micro_batch import Trial
from tests.support.alone import alone
from tests.support.plain_engine import PlainEngine
from tests.support.played_memory import PlayedMemory
from tests.support.tiny_models import tiny_model
from tests.support.tiny_runs import tiny_recipe

WORLD = SimpleNamespace(
    size=2, rank=0, is_main=True, max=lambda value: value, device=torch.device("cpu"), gather=lambda item: [item]
)


def chosen(tmp_path: Path, free: float, monkeypatch, batch: int = 16) -> tuple[int, list[int], list[str]]:
    """Micro batch, lengths that were run and what was said, where a sequence takes 100 bytes and 10 a token."""
    packing, _, lengths, said = chosen_and_kept(tmp_path, free, monkeypatch, batch)
    return packing, lengths, said


def chosen_and_kept(tmp_path: Path, free: float, monkeypatch, batch: int = 16, kept=None, longest: int = 40):
    recipe = tiny_recipe(tmp_path, "run", train__micro_batch="auto", train__global_batch=batch)
    lengths: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(micro_batch, "free_bytes", lambda world: free)
    monkeypatch.setattr(micro_batch, "optimizer_bytes_to_come", lambda engine, world: 0.0)
    monkeypatch.setattr(
        Trial, "bytes_of", lambda trial, number, length: lengths.append(length) or number * (100.0 + 10 * length)
    )
    packing, kept = micro_batch.choose_packing(mock.Mock(), recipe, longest, WORLD, said.append, kept)
    return packing.sequences, kept, lengths, said


def test_as_many_as_fit_by_half_a_sequence_and_a_whole_one(tmp_path, monkeypatch):
    """One takes 500 bytes, each more 400; of 2000 free bytes 1700 count."""
    sequences, lengths, said = chosen(tmp_path, 2000.0, monkeypatch)
    assert sequences == 4
    assert lengths == [20, 40], "two sequences might not fit where one does"
    assert said and said[0].startswith("train.micro_batch auto: 4: ")


def test_one_that_fits_is_enough_and_a_share_is_the_most(tmp_path, monkeypatch):
    assert chosen(tmp_path, 501.0, monkeypatch)[0] == 1
    assert chosen(tmp_path, 1e9, monkeypatch)[0] == 8
    sequences, lengths, _ = chosen(tmp_path, 1e9, monkeypatch, batch=2)
    assert (sequences, lengths) == (1, [40])


def test_none_that_fits_is_refused_with_what_would_help(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^train.micro_batch: not even one fits: .*gradient_checkpointing=true"):
        chosen(tmp_path, 499.0, monkeypatch)


def test_a_run_that_goes_on_takes_what_it_began_with(tmp_path, monkeypatch):
    """Four need 500 + 3 * 400 = 1700 bytes. Chosen anew, 1999 free bytes would give three: other sums and weights."""
    _, kept, *_ = chosen_and_kept(tmp_path, 2000.0, monkeypatch)
    kept = json.loads(json.dumps(kept))  # as it comes back from a checkpoint
    for free in (1999.0, 1700.0, 1e9):
        assert chosen_and_kept(tmp_path, free, monkeypatch, kept=kept)[:3] == (4, kept, []), "nothing is measured"


def test_a_smaller_one_where_it_does_not_fit_any_more_is_said_and_the_next_start_tries_again(tmp_path, monkeypatch):
    _, kept, *_ = chosen_and_kept(tmp_path, 2000.0, monkeypatch)
    sequences, still, _, said = chosen_and_kept(tmp_path, 1699.0, monkeypatch, kept=kept)
    assert (sequences, still) == (3, kept)
    assert said[0].startswith("train.micro_batch auto: 3: the run began with 4, for which there is no room now")
    with pytest.raises(UserError, match="not even one fits"):
        chosen_and_kept(tmp_path, 499.0, monkeypatch, kept=kept)


def test_in_another_setup_it_is_measured_anew(tmp_path, monkeypatch):
    _, kept, *_ = chosen_and_kept(tmp_path, 2000.0, monkeypatch)
    _, now, lengths, _ = chosen_and_kept(tmp_path, 2000.0, monkeypatch, kept=kept, longest=60)
    assert lengths == [30, 60] and now["setup"]["longest"] == 60


@pytest.mark.parametrize(("stage", "moments", "gradients"), [(0, 64, 32), (1, 32, 32), (2, 32, 16), (3, 32, 16)])
def test_moments_that_a_resume_has_loaded_are_not_counted_again(stage, moments, gradients):
    """Else a run that goes on sees less memory than the one that began, and chooses other things. On two ranks eight
    parameters have moments of 64 bytes, shared from ZeRO-1 on, and gradients of 32, shared from ZeRO-2 on."""
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: stage)
    assert optimizer_bytes_to_come(engine, WORLD) == moments + gradients
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer_bytes_to_come(engine, WORLD) == gradients


# -- on a GPU, whose memory is played ----------------------------------------------------------------------------------


class LikeZero(PlainEngine):
    """It leaves updates out by itself, so that the step enters its last phase."""

    def bfloat16_enabled(self) -> bool:
        return True

    def step(self) -> None:
        self.zero_grad()


def chosen_on_gpu(tmp_path: Path, monkeypatch, free: float, total: float = float("inf"), batch: int = 64):
    """The choice for a real model and step, the bytes that each pass needed, by (sequences, tokens), and the model."""
    recipe = tiny_recipe(tmp_path, "run", train__micro_batch="auto", train__global_batch=batch)
    engine, passes = LikeZero(tiny_model("llama")), []
    real = Trial.bytes_of

    def bytes_of(trial: Trial, number: int, length: int) -> float:
        passes.append(((number, length), real(trial, number, length)))
        return passes[-1][1]

    monkeypatch.setattr(Trial, "measures_peaks", True)
    monkeypatch.setattr(Trial, "bytes_of", bytes_of)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda world: free)
    monkeypatch.setattr(micro_batch, "optimizer_bytes_to_come", lambda engine, world: 0.0)
    with PlayedMemory(total).played():
        packing, _ = micro_batch.choose_packing(engine, recipe, 40, alone(), lambda line: None)
    return packing.sequences, passes, engine


def test_the_peaks_that_a_step_resets_in_its_phases_are_seen(tmp_path, monkeypatch):
    """`train_step` resets torch's peak before forward, backward and optimizer; the last of them needs next to nothing.

    The choice is the largest number whose own pass stays within the share of the free memory that may be used.
    """
    free = 6e6
    sequences, passes, _ = chosen_on_gpu(tmp_path, monkeypatch, free)
    needed = dict(passes)
    assert 1 < sequences < 64
    assert passes[-1][0] == (sequences, 40), "the last pass has the size that training will have"
    assert needed[(sequences, 40)] <= 0.85 * free
    each = (needed[(sequences, 40)] - needed[(1, 40)]) / (sequences - 1)
    assert needed[(sequences, 40)] + 2 * each > 0.85 * free, "nor is it much too small"
    assert needed[(1, 40)] > needed[(1, 20)] > 0


def test_a_batch_that_fits_is_taken_whole_and_nothing_is_left_of_the_passes(tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in tiny_model("llama").state_dict().items()}
    sequences, passes, engine = chosen_on_gpu(tmp_path, monkeypatch, 1e9, batch=6)
    assert sequences == 6 and [shape for shape, _ in passes[-3:]] == [(2, 40), (4, 40), (6, 40)]
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_gpu_that_others_use_has_less_room_than_it_says(tmp_path, monkeypatch):
    """What is free by the driver may be in pieces, or taken meanwhile: the number is lowered before anything fails."""
    alone_on_it, passes, _ = chosen_on_gpu(tmp_path, monkeypatch, 6e6)
    taken = dict(passes)[(alone_on_it, 40)]
    weights = sum(p.numel() * 4 for p in tiny_model("llama").parameters())
    sequences, _, _ = chosen_on_gpu(tmp_path, monkeypatch, 6e6, total=2 * weights + 0.6 * taken)
    assert 1 <= sequences < alone_on_it


def test_half_a_sequence_does_not_pay_for_what_is_allocated_once(tmp_path, monkeypatch):
    """The first pass allocates gradients and workspaces. As half a sequence's they would make more cost nothing."""
    _, passes, _ = chosen_on_gpu(tmp_path, monkeypatch, 6e6)
    (warm, first), (half, second) = passes[:2]
    assert warm == half == (1, 20) and first > second

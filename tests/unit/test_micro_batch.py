"""How many sequences fit, from two measurements, without ever running more than one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from ssgen_ds import micro_batch
from ssgen_ds.errors import UserError
from tests.support.tiny_runs import tiny_recipe

WORLD = SimpleNamespace(size=2, rank=0, is_main=True, max=lambda value: value)


def chosen(tmp_path: Path, free: float, monkeypatch, batch: int = 16) -> tuple[int, list[int], list[str]]:
    """Micro batch, lengths that were run and what was said, where a sequence takes 100 bytes and 10 a token."""
    recipe = tiny_recipe(tmp_path, "run", train__micro_batch="auto", train__global_batch=batch)
    lengths: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(micro_batch, "free_bytes", lambda world: free)
    monkeypatch.setattr(micro_batch, "optimizer_bytes_to_come", lambda engine, world: 0.0)
    monkeypatch.setattr(
        micro_batch, "_bytes_of", lambda engine, length, *_: lengths.append(length) or 100.0 + 10 * length
    )
    packing = micro_batch.choose_packing(mock.Mock(), recipe, 40, WORLD, said.append)
    return packing.sequences, lengths, said


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

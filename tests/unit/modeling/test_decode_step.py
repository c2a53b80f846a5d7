"""Calls that are replayed: the tokens of plain calls. CUDA's recorder is played: it does again what it was given."""

from __future__ import annotations

import logging

import pytest
import torch

from ssgen_ds.modeling import decode_step
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.requests import Request
from tests.support.tiny_models import tiny_model


class Recorder:
    """Plays `record_cuda`: the result lies in one tensor, which each replay fills anew."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work):
        result = work().clone()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return replay, result


def drafts() -> list[Request]:
    """Of different lengths, so that rows end, others come in, and the batch shrinks."""
    return [free_request([5 + i] * (3 + 4 * i), 20 + 3 * i, key=i, stop_ids=frozenset({9})) for i in range(7)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mistral"])
def test_replayed_calls_give_the_tokens_of_plain_ones(family, monkeypatch):
    """Lengths are rounded to 16 here, so that a sample goes from one graph to the next."""
    monkeypatch.setattr(decode_step, "_KEYS", 16)
    monkeypatch.setattr(decode_step, "_OFTEN", 2)
    model, record = tiny_model(family), Recorder()
    plain, stats = sample_fixed_point(CachedCausalLM(model), drafts(), Sampling(), 1, 3)
    replayed, again = sample_fixed_point(CachedCausalLM(model, record=record), drafts(), Sampling(), 1, 3)
    assert [one.tokens for one in replayed] == [one.tokens for one in plain]
    assert again.calls == stats.calls
    assert record.recorded >= 3 and record.replayed > stats.calls // 2


def test_wider_calls_and_rare_ones_are_made_plainly():
    model, record = tiny_model("llama"), Recorder()
    gold = [Request([5, 6], [7] * 30, [t % 3 == 0 for t in range(30)], key=i) for i in range(3)]
    sample_fixed_point(CachedCausalLM(model, record=record), gold, Sampling(), 4, 3)
    cached = CachedCausalLM(model, record=record)
    cached.open(2, 40)
    cached([Piece(0, 0, [5, 6], [1]), Piece(1, 0, [7], [0])])
    for slot in range(2, 9):
        cached([Piece(0, slot, [5], [0]), Piece(1, slot - 1, [5, 6], [0, 1])])
        cached([Piece(0, slot, [5], [0])])
    assert record.recorded == 0


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0, 2]])
def test_a_row_that_feeds_nothing_is_left_as_it_was(rows, monkeypatch):
    """The others of the batch are done or wait; the logits that come back are those of the rows that feed."""
    monkeypatch.setattr(decode_step, "_OFTEN", 0)
    model = tiny_model("llama")
    found = []
    for record in (None, Recorder()):
        cached = CachedCausalLM(model, record=record)
        cached.open(3, 24)
        cached([Piece(row, 0, [5 + row] * (4 + row), [3 + row]) for row in range(3)])
        logits = [cached([Piece(row, 4 + row, [9], [0]) for row in rows])]
        logits.append(cached([Piece(row, 5 + row if row in rows else 4 + row, [8], [0]) for row in range(3)]))
        found.append(torch.cat(logits))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_without_a_graph_that_is_right_decoding_goes_on_plainly(fault, monkeypatch, caplog):
    monkeypatch.setattr(decode_step, "_OFTEN", 1)
    decode_step._warn.cache_clear()

    def record(work):
        if fault == "raises":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return (lambda: None), work() + 1.0

    model = tiny_model("llama")
    plain, _ = sample_fixed_point(CachedCausalLM(model), drafts(), Sampling(), 1)
    with caplog.at_level(logging.WARNING):
        found, _ = sample_fixed_point(CachedCausalLM(model, record=record), drafts(), Sampling(), 1)
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    (told,) = [one.getMessage() for one in caplog.records if "cuda_graph" in one.getMessage()]
    assert told.startswith("selfgen.cuda_graph: decoding goes on without a graph: ")


def test_out_of_memory_is_not_hidden(monkeypatch):
    monkeypatch.setattr(decode_step, "_OFTEN", 0)

    def record(work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        sample_fixed_point(CachedCausalLM(tiny_model("llama"), record=record), drafts(), Sampling(), 1)

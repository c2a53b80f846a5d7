"""How a step's recording is dealt out, lent and forgotten."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.sampler.requests import Request
from ssgen_ds.training import one_forward as module
from ssgen_ds.training.one_forward import OneForward, one_forward
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")


def forward_of(rank: int, size: int, packing: Packing) -> OneForward:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return OneForward(model, packing, SimpleNamespace(rank=rank, size=size, device=CPU))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=14),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([None, 40]),
)
def test_a_rank_records_the_micro_batches_that_it_trains_on(shapes, ranks, each, tokens):
    packing = Packing(each, tokens, is_packed=True)
    requests = [
        Request([i] * prompt, [i] * response, [True] * response, key=i) for i, (prompt, response) in enumerate(shapes)
    ]
    sequences = [
        Sequence(one.prompt_ids + one.guess_ids, [-100] * len(one.prompt_ids) + one.guess_ids) for one in requests
    ]
    for rank in range(ranks):
        one = forward_of(rank, ranks, packing)
        shares = one.deal(requests)
        assert sorted(i for share in shares for i in share) == list(range(len(shapes)))
        window = build_window(sequences, packing, rank, ranks, "cpu")
        mine = [requests[i] for i in shares[rank]]
        for micro, batch in zip(one._micros, window.micro_batches, strict=False):
            texts = [token for number in micro for token in mine[number].prompt_ids + mine[number].guess_ids]
            assert batch.input_ids_BL[0].tolist() == texts


def test_it_is_lent_to_one_step_and_forgotten():
    one = forward_of(0, 1, Packing(2, is_packed=True))
    requests = [Request([5] * 3, [6] * 4, [False] * 4, key=i) for i in range(3)]
    window = build_window([Sequence([5] * 3 + [6] * 4, [-100] * 3 + [6] * 4)] * 3, one.packing, 0, 1, "cpu")
    function = one.module.model.layers[0]._gradient_checkpointing_func

    def is_replayed() -> list[bool]:
        found = []
        for replay in one.replays(window):
            with replay:
                found.append(one.module.model.layers[0]._gradient_checkpointing_func is not function)
        return found

    assert is_replayed() == [False, False], "nothing is recorded yet"
    one.deal(requests)
    with one.recording(requests):
        pass
    assert is_replayed() == [True, True]
    one.forget()
    assert is_replayed() == [False, False]


def test_a_recording_that_was_broken_off_is_none():
    one = forward_of(0, 1, Packing(2, is_packed=True))
    requests = [Request([5] * 3, [6] * 4, [False] * 4, key=0)]
    window = build_window([Sequence([5] * 3 + [6] * 4, [-100] * 3 + [6] * 4)], one.packing, 0, 1, "cpu")
    one.deal(requests)
    with one.recording(requests):
        pass
    with pytest.raises(ZeroDivisionError), one.recording(requests):
        raise ZeroDivisionError
    function = one.module.model.layers[0]._gradient_checkpointing_func
    with one.replays(window)[0]:
        assert one.module.model.layers[0]._gradient_checkpointing_func is function


@pytest.mark.parametrize(
    ("free", "taken", "fits"), [(20_000, 0, True), (9_000, 0, False), (20_000, 12_800, True), (20_000, 12_900, False)]
)
def test_a_recording_needs_room_beside_a_micro_batch(free, taken, fits, monkeypatch):
    """Two layers of 32 elements in float32, four sequences of five tokens: 5120 bytes. Together .9 may be taken."""
    monkeypatch.setattr(module, "RECORDED_SHARE", 0.5)
    monkeypatch.setattr(module, "free_bytes", lambda world: float(free))
    monkeypatch.setattr(module, "optimizer_bytes_to_come", lambda engine, world: 0.0)
    overrides = ["method.name=bss", "selfgen.refresh_every=1", "model.gradient_checkpointing=true", "data.packing=true"]
    recipe = load_recipe("recipes/smoke.yaml", [*overrides, "train.global_batch=4", "train.micro_batch=2"])
    packing = Packing(2, is_packed=True)
    one = forward_of(0, 1, packing)
    engine = SimpleNamespace(module=one.module, zero_optimization_stage=lambda: 2)
    world = SimpleNamespace(rank=0, size=1, device=CPU, is_main=True, max=float)
    said: list[str] = []
    found = one_forward(engine, recipe, packing, 5, taken, world, said.append)
    assert (found is not None) == fits, said
    assert ("takes" in said[0]) != fits

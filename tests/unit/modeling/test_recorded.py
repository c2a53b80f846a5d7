"""One forward: gradients from what the sampler recorded are those of sampling first and training then."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.data.window import IGNORE, Sequence, collate
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.loss import token_loss
from ssgen_ds.modeling.packed import packed_attention
from ssgen_ds.modeling.recorded import Recording, checkpointed_layers, has_dropout
from ssgen_ds.recipe.schema import AdapterConfig
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point
from ssgen_ds.sampler.requests import CallLimit, Request
from tests.support.tiny_models import tiny_model

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "mistral", "mixtral", "cohere"]


def checkpointed(family: str, adapter: str = "none") -> Any:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model: Any = tiny_model(family, **dropout)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter == "lora":
        model.enable_input_require_grads()
        model = apply_adapter(model, AdapterConfig(kind="lora", rank=4), None, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def requests_of(shapes: list[tuple[int, int]], rate: float) -> list[Request]:
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=generator).tolist()

    found = []
    for number, (prompt, response) in enumerate(shapes):
        coins = (torch.rand(response, generator=generator) < rate).tolist()
        coins[-1] = False
        found.append(Request(ids(prompt), ids(response), coins, key=number, feeds_all=True))
    return found


def sampled(model: Any, requests: list[Request], **how: Any) -> tuple[Recording, list[list[int]]]:
    """What was recorded while sampling, and the mixed contexts."""
    model.eval()
    lengths = [len(one.prompt_ids) + len(one.coins) for one in requests]
    layers, width = checkpointed_layers(model), model.config.hidden_size
    recording = Recording(layers, lengths, width, model.dtype, torch.device("cpu"))
    with recording.recording():
        results, _ = sample_fixed_point(CachedCausalLM(model, recording=recording), requests, Sampling(), **how)
    model.train()
    return recording, [one.tokens for one in results]


def gradients(
    model: Any, requests: list[Request], texts: list[list[int]], micro: list[int], recording: Recording | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the gold tokens after the contexts, one micro batch."""
    sequences = [
        Sequence(one.prompt_ids + text, [IGNORE] * len(one.prompt_ids) + one.guess_ids)
        for one, text in ((requests[i], texts[i]) for i in micro)
    ]
    batch = collate(sequences, "cpu", is_packed=True)
    model.zero_grad()
    with packed_attention(model, batch.layout) as attention:
        if recording is None:
            loss = token_loss(model, batch, attention=attention)
            loss.backward()
        else:
            with recording.replayed(micro):
                loss = token_loss(model, batch, attention=attention)
                loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: Any, requests: list[Request], micro: list[int], **how: Any) -> None:
    recording, texts = sampled(model, requests, **how)
    plain = sample_fixed_point(CachedCausalLM(model.eval()), requests, Sampling(), **how)[0]
    assert texts == [one.tokens for one in plain], "recording changes no token"
    model.train()
    loss, expected = gradients(model, requests, texts, micro, None)
    again, found = gradients(model, requests, texts, micro, recording)
    assert again == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    norm = sum(value.double().square().sum() for value in expected.values())
    assert (difference / norm).sqrt() < 1e-5


SHAPES = [(5, 12), (1, 7), (17, 20), (9, 1), (3, 16)]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_sampling_first(family, adapter):
    model = checkpointed(family, adapter)
    assert len(checkpointed_layers(model)) == model.config.num_hidden_layers
    assert_same_gradients(model, requests_of(SHAPES, 0.3), [0, 2, 4], block=4, rows=2)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 14)), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.sampled_from([1, 3, None]),
    st.sampled_from([1, 2, None]),
    st.sampled_from([CallLimit(), CallLimit(tokens=6)]),
)
def test_whatever_the_lengths_coins_blocks_refills_and_cuts(shapes, rate, block, rows, limit):
    """With a rate of 0 nothing is drawn, and the contexts are fed once."""
    model = checkpointed("llama")
    assert_same_gradients(model, requests_of(shapes, rate), [*range(len(shapes))], block=block, rows=rows, limit=limit)


def test_the_layers_do_not_compute_in_the_forward():
    model = checkpointed("llama")
    requests = requests_of(SHAPES, 0.3)
    recording, texts = sampled(model, requests, block=4)
    calls: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    batch = collate([Sequence(requests[0].prompt_ids + texts[0], [IGNORE] * 5 + requests[0].guess_ids)], "cpu", True)
    with packed_attention(model, batch.layout) as attention, recording.replayed([0]):
        loss = token_loss(model, batch, attention=attention)
        assert calls == []
        loss.backward()
    assert calls == [1, 0], "each once, in the backward"


def test_the_model_is_left_as_it_was():
    model = checkpointed("llama")
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    recording, _ = sampled(model, requests_of(SHAPES, 0.3), block=1)
    for context in (recording.replayed([0]), recording.recording()):
        with suppress(ZeroDivisionError), context:
            raise ZeroDivisionError
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before
    assert [len(layer._forward_hooks) for layer in model.model.layers] == hooks


def test_without_checkpointing_there_is_nothing_to_replay():
    assert checkpointed_layers(tiny_model("llama")) == []


def test_dropout_is_found():
    """What was recorded is without it."""
    assert has_dropout(tiny_model("gpt2"))
    assert not has_dropout(tiny_model("llama"))
    assert has_dropout(tiny_model("llama", attention_dropout=0.1))

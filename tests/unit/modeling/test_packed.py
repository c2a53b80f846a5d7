"""Packed micro batches: which tokens may see which, and that the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssgen_ds.data.window import IGNORE, Sequence, collate
from ssgen_ds.modeling.packed import attention_replaced, layer_kinds, packed_attention
from tests.support.tiny_models import like_flash_attention, tiny_model

LENGTHS = (3, 24, 2)
SEQUENCES = [Sequence(list(range(5, 5 + n)), [IGNORE] * (n - 1) + [2]) for n in LENGTHS]


def packed_logits(model: torch.nn.Module, input_ids_1N: torch.Tensor) -> torch.Tensor:
    layout = collate(SEQUENCES, "cpu", True).layout
    with torch.no_grad(), packed_attention(model, layout) as arguments:
        return model(input_ids=input_ids_1N, use_cache=False, **arguments).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_token_is_seen_by_the_later_ones_of_its_own_sequence_alone(family: str, attention: str) -> None:
    """And not from beyond the windows of all layers: 2 of 8 tokens in Mistral."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    ids_1N = collate(SEQUENCES, "cpu", True).input_ids_BL
    before_NV = packed_logits(model, ids_1N)
    order = [i for i, sequence in enumerate(SEQUENCES) for _ in sequence.input_ids]
    sequence_of = torch.tensor(order)
    _, window = layer_kinds(model.config)
    reach = len(ids_1N[0]) if window is None else model.config.num_hidden_layers * (window - 1)
    for place in range(ids_1N.shape[1]):
        changed_1N = ids_1N.clone()
        changed_1N[0, place] = 60
        moved_N = (packed_logits(model, changed_1N) - before_NV).abs().amax(-1) > 0
        places_N = torch.arange(len(moved_N))
        allowed_N = (sequence_of == sequence_of[place]) & (places_N >= place) & (places_N <= place + reach)
        assert torch.equal(moved_N, allowed_N), place


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention_gets_rows_without_a_mask_and_computes_the_same(family: str, monkeypatch) -> None:
    model = tiny_model(family)
    ids_1N = collate(SEQUENCES, "cpu", True).input_ids_BL
    expected_NV = packed_logits(model, ids_1N)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", like_flash_attention)
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(packed_logits(model, ids_1N), expected_NV, atol=2e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was_when_its_forward_fails() -> None:
    model = tiny_model("llama")
    config = model.config.get_text_config()
    before, functions = config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS.keys())

    def forward_that_fails() -> None:
        with attention_replaced(config, "ours", lambda: None) as implementation:
            assert implementation == before and config._attn_implementation == "ours"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward_that_fails()
    assert config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == functions


def test_padded_micro_batches_are_left_alone() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with packed_attention(model, None) as arguments:
        assert arguments == {} and model.config._attn_implementation == before


def test_kinds_of_layers() -> None:
    assert layer_kinds(tiny_model("llama").config) == (["full_attention"], None)
    kinds, window = layer_kinds(tiny_model("gemma2").config)
    assert kinds == ["full_attention", "sliding_attention"] and window is not None

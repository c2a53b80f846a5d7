"""The loss against a plain forward of each sequence alone: padded, packed, in chunks, for every family."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

from ssgen_ds.data.window import IGNORE, Sequence, collate
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.loss import check_loss, token_loss
from ssgen_ds.recipe.schema import AdapterConfig
from tests.support.tiny_models import FAMILIES, tiny_model

SEQUENCES = [
    Sequence([5, 6, 7, 8, 9, 10, 11, 2], [IGNORE, IGNORE, 30, 31, IGNORE, 10, 11, 2]),
    Sequence([40, 41, 42], [IGNORE, 41, 2], weight=0.5),
    Sequence(list(range(3, 30)), [IGNORE] * 9 + list(range(40, 58))),
]
VOCABULARY = 96


def plain_loss(model: torch.nn.Module, sequences: list[Sequence] = SEQUENCES) -> torch.Tensor:
    total = torch.zeros(())
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.input_ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(sequence.labels[1:])
        total = total + sequence.weight * F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    return total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def model_of(family: str, attention: str) -> torch.nn.Module:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    return model


ALL = [*FAMILIES, "mistral", "cohere", "granite"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_loss_and_gradients_are_those_of_each_sequence_alone(family, packed, attention):
    """In chunks of two rows, and at once.

    Mistral's window is narrower than a sequence, Gemma 2 caps its logits, Cohere and Granite scale them.
    """
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 caps its attention scores, which sdpa cannot")
    model = model_of(family, attention)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config._attn_dropout = 0.0
    plain = plain_loss(model)
    plain.backward()
    wanted = gradients(model)
    for chunk in (2 * VOCABULARY, 10**9):
        loss = token_loss(model, collate(SEQUENCES, "cpu", packed), chunk)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
        (3.0 * loss).backward()
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, 3 * wanted[name], rtol=1e-3, atol=1e-5 + 2e-4 * float(wanted[name].abs().max())
            )


def test_no_more_logits_exist_than_a_chunk():
    """The projection is called for two rows at a time, and its input is nothing but labelled positions."""
    model = tiny_model("llama")
    rows = []
    project = model.lm_head.forward
    with mock.patch.object(model.lm_head, "forward", lambda hidden: rows.append(hidden.shape[0]) or project(hidden)):
        token_loss(model, collate(SEQUENCES, "cpu"), 2 * VOCABULARY)
    assert rows == [2] * 12 + [1]  # 5 + 2 + 18 labels


class Widths(TorchDispatchMode):
    """Rows of every tensor as wide as a vocabulary that any operation makes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows.add(tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_nothing_as_wide_as_the_vocabulary_is_longer_than_a_chunk(family, packed):
    """In forward and backward, for 25 labels of 38 tokens, also where logits are capped or scaled.

    But for the head's weight, which has 32 rows when it is transposed.
    """
    prime = 97  # no other dimension
    with Widths(prime) as widths:
        token_loss(tiny_model(family, prime), collate(SEQUENCES, "cpu", packed), 2 * prime).backward()
    assert {1, 2} <= widths.rows <= {1, 2, 32}


def test_the_head_is_as_it_was_afterwards_also_after_an_error():
    model = tiny_model("llama")
    hooks = len(model.lm_head._forward_hooks)
    token_loss(model, collate(SEQUENCES, "cpu"))
    with pytest.raises(IndexError):
        token_loss(model, collate([Sequence([5, 10**6], [IGNORE, 3])], "cpu"))
    assert "forward" not in vars(model.lm_head)
    assert len(model.lm_head._forward_hooks) == hooks
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY)


def test_a_frozen_head_gets_no_gradient_and_an_adapter_does():
    lora = AdapterConfig(kind="lora", rank=2, alpha=4)
    model = apply_adapter(tiny_model("qwen2"), lora, None, seed=0)
    token_loss(model, collate(SEQUENCES, "cpu"), 2 * VOCABULARY).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("family", ALL)
def test_no_packed_sequence_sees_another(family):
    """Every other sequence is changed, in its tokens and in its length: the loss of the middle one stays.

    Only the middle one has a weight.
    """
    model = tiny_model(family)
    middle = Sequence([50, 51, 52, 53, 54], [IGNORE, IGNORE, 52, 53, 2])
    losses = []
    for first, last in (([5, 6, 7], [8, 9, 10, 11]), ([60, 61, 62, 63, 64, 65], [70]), ([80] * 30, [12] * 40)):
        around = [Sequence(ids, [IGNORE, *ids[1:]], weight=0.0) for ids in (first, last)]
        batch = collate([around[0], middle, around[1]], "cpu", is_packed=True)
        losses.append(token_loss(model, batch).item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert losses[0] == pytest.approx(plain_loss(model, [middle]).item(), abs=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_the_check_passes_for_supported_families(family):
    check_loss(tiny_model(family), is_packed=True)


def test_families_that_see_across_are_refused_for_packing_only():
    """GPT-Neo slices its own mask; Bloom takes positions from the mask (ALiBi)."""
    shape = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    neo = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=64, **shape,
    )  # fmt: skip
    for config in (neo, BloomConfig(hidden_size=32, n_layer=2, n_head=4, **shape)):
        model = AutoModelForCausalLM.from_config(config).eval()
        check_loss(model, is_packed=False)
        with pytest.raises(UserError, match=rf"data.packing: models of type {config.model_type} cannot"):
            check_loss(model, is_packed=True)


def test_a_family_with_unknown_logits_is_refused():
    model = tiny_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    with mock.patch.object(model, "forward", scaled), pytest.raises(UserError, match="models of type llama compute"):
        check_loss(model, is_packed=False)


def test_no_step_of_a_micro_batch_makes_the_host_wait():
    """On a GPU each `item` or `nonzero` would: forward and backward of a packed batch have none."""
    model = tiny_model("llama")
    batch = collate(SEQUENCES, "cpu", is_packed=True)
    token_loss(model, batch).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        token_loss(model, batch).backward()
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}

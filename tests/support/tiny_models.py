"""Tiny random models of the families that the product supports, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "llama", "qwen2", "gpt_neox", "gemma2", "mixtral")

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2": {**_GROUPED, "tie_word_embeddings": False},
    "gpt_neox": _SHAPE,
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 16},
    "phi3": {**_GROUPED, "head_dim": 8, "pad_token_id": 0},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "cohere": _GROUPED,
    "granite": {**_GROUPED, "logits_scaling": 4.0},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1},
}


def tiny_config(family: str, vocab_size: int = 96, **overrides: Any) -> PreTrainedConfig:
    """A two-layer configuration of `family` with BOS 1 and EOS 2."""
    settings = {**_SETTINGS[family], "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, **overrides}
    return AutoConfig.for_model(family, **settings)


def tiny_model(family: str, vocab_size: int = 96, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random float32 model in eval mode. Weights are larger than usual, so that its logits differ clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, vocab_size, **{"initializer_range": 0.2, **overrides})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer(vocab_size: int = 96) -> PreTrainedTokenizerFast:
    """Characters as tokens: <unk> 0, <s> 1, </s> 2, then printable ASCII from the space on; no pad token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)][: vocab_size - 3]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny_model(
    family: str, folder: str | Path, vocab_size: int = 96, seed: int = 0, **overrides: Any
) -> torch.nn.Module:
    """Write model and tokenizer to `folder` and return the model."""
    model = tiny_model(family, vocab_size, seed, **overrides)
    model.save_pretrained(folder)
    tiny_tokenizer(vocab_size).save_pretrained(folder)
    return model


def like_flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What flash-attn computes, which needs a GPU: causal, in the layer's window, and with no mask of [L, L]."""
    assert attention_mask is None and kwargs.get("position_ids") is None
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if sliding_window is not None:
        seen &= ~torch.ones(length, length, dtype=torch.bool).tril(-sliding_window)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None

"""Small models of families for the pretended GPU; their windows are shorter than the texts."""

from __future__ import annotations

from typing import Any

_COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 16, "sliding_window": 32},
    "gemma3_text": {"head_dim": 16, "sliding_window": 32},
    "olmo2": {},
    "phi3": {},
    "granite": {},
    "cohere2": {"sliding_window": 32},
    "smollm3": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, **_EXPERTS},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {"head_dim": 16, **{key: _DEEPSEEK[key] for key in list(_DEEPSEEK)[:6] if "key_value" not in key}},
}


def settings_of(family: str) -> dict[str, Any]:
    """Of its configuration."""
    return {**_BASE, **FAMILIES[family], **_COMMON}

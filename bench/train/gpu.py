"""T3: model FLOP utilisation of a LoRA step on one GPU, with a model of 7 to 8 billion random weights.

MFU = operations a token * tokens a second / the card's published dense bfloat16 operations a second
operations a token: `ssgen_ds.plan.timing.operations_per_token`, without those of gradient checkpointing
(LoRA: 4 N + 6 N_lora + attention; N without the embedding)
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.train.sizes import Sizes
from ssgen_ds.config import AdapterConfig
from ssgen_ds.loss import token_loss
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.packed import packed_attention
from ssgen_ds.plan.sizes import measure as measure_sizes
from ssgen_ds.plan.timing import CARDS, operations_per_token
from ssgen_ds.window import Sequence, collate

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def utilisation(operations: float, tokens_per_second: float, card: str) -> float | None:
    """Share of the card's published operations a second; None for a card that is not in the table."""
    known = [flops for name, (flops, _) in CARDS.items() if name.lower() in card.lower()]
    return operations * tokens_per_second / known[0] if known else None


def lora_steps(layers: int, device: str, length: int, rows: int, steps: int, **shape: Any) -> dict[str, float]:
    """Tokens a second, peak bytes and operations a token of LoRA steps: AdamW, checkpointing, packed rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", num_hidden_layers=layers, **{**SHAPE, **shape})
    adapter = AdapterConfig(kind="lora", rank=16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = apply_adapter(model, adapter, None, 0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    sequence = Sequence([5] * length, [-100] * (length * 3 // 4) + [7] * (length - length * 3 // 4))
    batch = collate([sequence] * rows, device, is_packed=True)
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        with packed_attention(model, batch.layout) as attention:
            (token_loss(model, batch, attention=attention) / (rows * length)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    sizes = measure_sizes(config, adapter, dtype, 0, is_packed=True)
    return {
        "tokens_per_second": rows * length / statistics.median(seconds[1:]),
        "peak_bytes": float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0,
        "operations": operations_per_token(sizes, length, checkpointing=False),
    }


def measure(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The row, on the GPU that is there."""
    card = torch.cuda.get_device_name()
    found = lora_steps(sizes.gpu_layers, "cuda", 2048, 4, 8)
    share = utilisation(found["operations"], found["tokens_per_second"], card)
    checks = {"MFU >= 45 %": share is not None and share >= 0.45}
    return {
        "ours": {"MFU": share or 0.0, "tokens/s": found["tokens_per_second"], "peak GiB": found["peak_bytes"] / 2**30},
        "ratio": {},
        "checks": checks,
        "holds": all(checks.values()),
        "details": {"card": card, **found},
    }

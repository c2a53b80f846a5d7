"""Micro batches without padding: sequences one after another in a single row, each attending to itself alone.

The model sees N tokens and no padding in everything but attention. Around its attention function the tokens are laid
out as [B, L]: no sequence can see another, whatever the function does, and plain causal kernels can do it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "ssgen_padding_free"  # of the attention function while a forward runs


@dataclass(frozen=True)
class Layout:
    """Where the N tokens of a packed row lie in a padded batch [B, L]: at `row * L + position`."""

    rows: int
    width: int
    slots_N: torch.Tensor
    positions_1N: torch.Tensor

    def to_padded(self, packed_1HND: torch.Tensor) -> torch.Tensor:
        """[1, heads, N, D] -> [B, heads, L, D], zeros where there is no token."""
        _, heads, _, size = packed_1HND.shape
        flat_SHD = _Scatter.apply(packed_1HND[0].transpose(0, 1), self.slots_N, self.rows * self.width)
        return flat_SHD.view(self.rows, self.width, heads, size).transpose(1, 2)

    def to_packed(self, padded_BLHD: torch.Tensor) -> torch.Tensor:
        """[B, L, heads, D] -> [1, N, heads, D]."""
        return padded_BLHD.flatten(0, 1).index_select(0, self.slots_N)[None]


class _Scatter(torch.autograd.Function):
    """Rows [N, ...] to their slots of [S, ...]. torch's own index_copy would keep the rows for the backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slots_N: torch.Tensor, size: int) -> torch.Tensor:
        ctx.slots_N = slots_N
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, slots_N, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, ctx.slots_N), None, None


def attention_function(implementation: str, module: torch.nn.Module) -> Any:
    """What transformers would call in this attention layer."""
    if implementation == "eager":  # every family has its own, next to its layers
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


@contextmanager
def attention_replaced(config: Any, name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Inside, a model of this (text) configuration calls `function` in its attention layers; yields what it called."""
    implementation = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = function
    config._attn_implementation = name
    try:
        yield implementation
    finally:
        config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def packed_attention(model: torch.nn.Module, layout: Layout | None) -> Iterator[dict[str, Any]]:
    """Inside, the model's attention works on the rows of the layout; yields what its forward must be called with.

    Nothing happens for None.
    """
    if layout is None:
        yield {}
        return
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    masks = _masks(config, model.dtype, layout)

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        mask = None if attention_mask is None or attention_mask.shape[-1] == 1 else attention_mask
        function = attention_function(implementation, module)
        padded, _ = function(module, *map(layout.to_padded, (query, key, value)), mask, **kwargs)
        return layout.to_packed(padded), None

    with attention_replaced(config, _NAME, attend):
        yield {"attention_mask": masks, "position_ids": layout.positions_1N}


def layer_kinds(config: Any) -> tuple[list[str], int | None]:
    """The kinds of attention layers in a (text) configuration, and the window of those that slide."""
    window = getattr(config, "sliding_window", None)  # family traits: most configurations lack them
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return sorted(set(kinds)), window


def _masks(config: Any, dtype: torch.dtype, layout: Layout) -> torch.Tensor | dict[str, torch.Tensor]:
    """[1, 1, L, L] for all rows: padding comes last, and what it attends to is dropped.

    A mask of one element stands for none: sdpa then takes its causal kernels, which need no mask.
    """
    kinds, window = layer_kinds(config)
    columns_L = torch.arange(layout.width, device=layout.slots_N.device)

    def mask(kind: str) -> torch.Tensor:
        seen_LL = columns_L <= columns_L[:, None]
        narrow = kind == "sliding_attention" and window is not None and window < layout.width
        if narrow:
            seen_LL &= columns_L > columns_L[:, None] - window
        if config._attn_implementation == "eager":
            hidden = torch.zeros_like(seen_LL, dtype=dtype).masked_fill(~seen_LL, torch.finfo(dtype).min)
            return hidden[None, None]
        return seen_LL[None, None] if narrow else seen_LL[None, None, :1, :1]

    masks = {kind: mask(kind) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))

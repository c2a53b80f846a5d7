"""Micro batches without padding: sequences one after another in a single row, each attending to itself alone.

The model sees N tokens and no padding in everything but attention. Around its attention function the tokens are laid
out as [B, L]: no sequence can see another, whatever the function does, and plain causal kernels can do it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssgen_ds.data.window import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NAME = "ssgen_padding_free"  # name of the attention function while a forward runs


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
def packed_attention(model: PreTrainedModel, layout: Layout | None) -> Iterator[dict[str, Any]]:
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
        if implementation == "flash_attention_2":
            kwargs.pop("position_ids", None)  # they are those of the one row that the model sees
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

    A mask of one element means no mask: sdpa then takes its causal kernels, which need no mask. So do those of
    flash-attn, which know windows by themselves.
    """
    kinds, window = layer_kinds(config)
    is_flash = config._attn_implementation == "flash_attention_2"
    columns_L = torch.arange(layout.width, device=layout.slots_N.device)

    def mask(kind: str) -> torch.Tensor:
        seen_LL = columns_L <= columns_L[:, None]
        narrow = kind == "sliding_attention" and window is not None and window < layout.width and not is_flash
        if narrow and window is not None:
            seen_LL &= columns_L > columns_L[:, None] - window
        if config._attn_implementation == "eager":
            hidden = torch.zeros_like(seen_LL, dtype=dtype).masked_fill(~seen_LL, torch.finfo(dtype).min)
            return hidden[None, None]
        return seen_LL[None, None] if narrow else seen_LL[None, None, :1, :1]

    masks = {kind: mask(kind) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))

"""Run the vocabulary projection only at the positions whose logits are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def project_only(model: torch.nn.Module, wanted_BL: torch.Tensor) -> Iterator[None]:
    """Within it the model's own forward returns logits [1, N, V] for the N True positions of `wanted_BL`, row by row.

    The rows are picked in front of the output embedding and the model's forward does the rest: calling the projection
    ourselves would lose the soft-capping and the scales of Gemma, Cohere and Granite.
    """

    def pick_rows(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        hidden_BLH, *rest = args
        return (hidden_BLH[wanted_BL].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick_rows)
    try:
        yield
    finally:
        handle.remove()

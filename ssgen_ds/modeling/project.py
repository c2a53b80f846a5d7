"""Run the vocabulary projection only where logits are needed, and for a loss in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Head = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def project_only(model: PreTrainedModel, wanted_N: torch.Tensor) -> Iterator[None]:
    """Within it the model's own forward returns logits [1, N, V] of N of its B * L positions, in the order given.

    The rows are picked in front of the output embedding and the model's forward does the rest: calling the projection
    ourselves would lose the soft-capping and the scales of Gemma, Cohere and Granite.
    """

    def pick_rows(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        hidden_BLH, *rest = args
        return (hidden_BLH.flatten(0, 1)[wanted_N].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick_rows)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def instead_of_logits(
    model: PreTrainedModel, compute: Callable[[torch.Tensor, Head, list[torch.nn.Parameter]], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Within it a forward of the model computes `compute(hidden, head, parameters)` where it would compute logits.

    hidden is [B * L, H], head maps any rows of it to logits in float32, parameters are those of the head. The
    result is a scalar; it comes out in the list that this yields, through the hooks of the output embedding: ZeRO-3
    gathers its weights by them. The model continues with a zero in place of its logits.
    """
    projection = model.get_output_embeddings()
    project, transform = projection.forward, logit_transform(model.config.get_text_config())
    results: list[torch.Tensor] = []

    def forward(hidden_BLH: torch.Tensor) -> torch.Tensor:
        result = compute(
            hidden_BLH.flatten(0, 1), lambda rows: transform(project(rows)).float(), list(projection.parameters())
        )
        return result.view(1, 1, 1)

    def take(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        results.append(output.view(()))
        return torch.zeros_like(output)

    replaced = vars(projection).get("forward")
    projection.forward = forward
    handle = projection.register_forward_hook(take)  # the last one: it comes after DeepSpeed's
    try:
        yield results
    finally:
        handle.remove()
        del projection.forward
        if replaced is not None:
            projection.forward = replaced


def logit_transform(config: Any) -> Head:
    """What a family does to its logits after the projection; `check_loss` finds out where this is not all."""
    settings = config.to_dict()
    factor = 1.0
    if config.model_type.startswith("cohere"):
        factor *= settings["logit_scale"]
    if config.model_type.startswith("granite"):
        factor /= settings["logits_scaling"]
    if config.model_type.startswith("hyperclovax"):
        factor *= settings["logits_scaling"]
    factor *= settings.get("lm_head_multiplier") or settings.get("output_multiplier") or 1.0  # Falcon-H1, Muse
    cap = settings.get("final_logit_softcapping")  # Gemma

    def transform(logits: torch.Tensor) -> torch.Tensor:
        scaled = logits if factor == 1.0 else logits * factor
        return scaled if not cap else torch.tanh(scaled / cap) * cap

    return transform

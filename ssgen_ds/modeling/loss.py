"""Summed token loss. Tokens are the unit: sum here, divide once by the global weight in `training/step.py`.

Logits are made for labelled tokens only, and for a chunk of them at a time: [tokens, vocabulary] never exists. Their
gradient is made in the same go, as Liger Kernel does it (Hsu et al., arXiv 2410.10989, 3.2): nothing of them is kept
for the backward, and nothing is computed twice.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ssgen_ds.data.window import MicroBatch, Sequence, collate
from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.packed import packed_attention
from ssgen_ds.modeling.project import Head, instead_of_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHUNK_LOGITS = 2**26  # logits that exist at a time: 256 MiB in float32


def token_loss(
    model: torch.nn.Module,
    batch: MicroBatch,
    chunk_logits: int = CHUNK_LOGITS,
    attention: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Weighted sum of the negative log-likelihoods of the batch's labels: a scalar in nats, float32.

    Args:
        model: a causal LM (or the DeepSpeed engine around it).
        batch: its labels may differ from what the model reads: BSS reads mixed tokens and predicts gold ones.
        chunk_logits: logits to hold at a time.
        attention: what the caller's `packed_attention` gave. If you call backward, enter it around both: gradient
            checkpointing computes the layers again there.
    """
    module: Any = getattr(model, "module", model)
    step = max(1, chunk_logits // module.config.get_text_config().vocab_size)

    def compute(hidden_SH: torch.Tensor, head: Head, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        rows_NH = hidden_SH.index_select(0, batch.predicting_N)
        return _ChunkedLoss.apply(rows_NH, batch.labels_N, batch.weights_N, head, step, *parameters)

    own = packed_attention(module, batch.layout) if attention is None else nullcontext(attention)
    with instead_of_logits(module, compute) as losses, own as inputs:
        # Padding is on the right, so that a causal mask is enough, and kernels that take no other can be used.
        model(input_ids=batch.input_ids_BL, use_cache=False, **inputs)
    return losses[0]


class _ChunkedLoss(torch.autograd.Function):
    """sum(w * nll) over chunks of `step` rows, with its gradient for the rows and the head's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        head: Head,
        step: int,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        total = torch.zeros((), device=rows_NH.device)
        rows_gradients: list[torch.Tensor] = []
        gradients: dict[int, torch.Tensor] = {}  # gradients of the parameters, summed over chunks
        for begin in range(0, len(labels_N), step):
            chunk = slice(begin, begin + step)
            rows = rows_NH[chunk].detach().requires_grad_(needed[0])
            inputs = [tensor for tensor, is_needed in zip((rows, *parameters), needed, strict=True) if is_needed]
            with torch.set_grad_enabled(bool(inputs)):
                nll = F.cross_entropy(head(rows), labels_N[chunk], reduction="none")
                loss = (nll * weights_N[chunk]).sum()
            total += loss.detach()
            if inputs:
                found = list(torch.autograd.grad(loss, inputs))
                if needed[0]:
                    rows_gradients.append(found.pop(0))
                for number, gradient in enumerate(found):
                    gradients[number] = gradients[number].add_(gradient) if number in gradients else gradient
        ctx.needed = needed
        ctx.gradients = ([torch.cat(rows_gradients)] if rows_gradients else []) + list(gradients.values())
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        gradients = iter(ctx.gradients)
        found = [next(gradients).mul_(upstream) if is_needed else None for is_needed in ctx.needed]
        ctx.gradients = None
        return (found[0], None, None, None, None, *found[1:])


@torch.no_grad()
def check_loss(model: PreTrainedModel, is_packed: bool) -> None:
    """Refuse a model whose loss would come out wrong. Under ZeRO-3 every rank must call this.

    A family may do something to its logits that we do not know of, or take positions or masks from elsewhere, so that
    packed sequences would see each other. Two short sequences show it, against logits from a plain forward of each.

    Raises:
        UserError: naming the model type.
    """
    config, device = model.config.get_text_config(), model.device
    sequences = []
    for start, length in ((11, 12), (29, 7)):
        ids = [(start + 7919 * i) % config.vocab_size for i in range(length)]
        sequences.append(Sequence(ids, [-100, *ids[1:]], weight=1.0 / start))
    plain = 0.0
    for sequence in sequences:
        logits_TV = model(input_ids=torch.tensor([sequence.input_ids], device=device), use_cache=False).logits[0]
        labels = torch.tensor(sequence.labels[1:], device=device)
        plain += sequence.weight * F.cross_entropy(logits_TV[:-1].float(), labels, reduction="sum").item()
    padded = _or_nan(model, collate(sequences, device))
    packed = _or_nan(model, collate(sequences, device, is_packed=True)) if is_packed else padded
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * abs(plain)
    if not abs(padded - plain) < tolerance:
        raise UserError(
            f"model.path: models of type {config.model_type} compute their logits in a way that is not known here "
            f"(a loss of {padded:.4f} instead of {plain:.4f}), so they cannot be trained"
        )
    if not abs(packed - plain) < tolerance:
        raise UserError(
            f"data.packing: models of type {config.model_type} cannot train on packed sequences (a loss of "
            f"{packed:.4f} instead of {plain:.4f}: they would see each other); set data.packing=false"
        )


def _or_nan(model: torch.nn.Module, batch: MicroBatch) -> float:
    try:
        return token_loss(model, batch).item()
    except (RuntimeError, IndexError, TypeError, ValueError) as error:  # an attention that ours did not reach
        if is_device_error(error):
            raise
        return float("nan")

"""One forward: what the sampler has computed of a sequence takes the place of the training forward.

With gradient checkpointing a training step computes every layer twice: in a forward that keeps the input of each layer,
and again in the backward, from that input. The sampler's passes over a mixed context have just computed these very
inputs, with the weights that train on it. So the last values are recorded at every position and layer. In the step each
layer returns what was recorded and computes nothing; its backward computes the layer once, from its recorded input.

Gradients are those of sampling first and training then, to rounding. That needs a model without dropout, whose layers
go through transformers' own checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ssgen_ds.modeling.call_layout import on_device
from ssgen_ds.modeling.pieces import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpointed_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers whose backward computes them again, in order; [] where a family has others, or none is on."""
    layers = [
        one for one in model.modules() if isinstance(one, GradientCheckpointingLayer) and one.gradient_checkpointing
    ]
    return layers if len(layers) == model.config.get_text_config().num_hidden_layers else []


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a forward in training mode differs from one in eval mode."""
    modules = any(isinstance(one, torch.nn.Dropout) and one.p > 0 for one in model.modules())
    # Attention functions are told their rate by the layer. Family traits: not every layer has one.
    return modules or any((getattr(one, "attention_dropout", 0.0) or 0.0) > 0 for one in model.modules())


class Recording:
    """The outputs of all layers for some sequences, one after another: S positions, and a row of zeros.

    Args:
        layers: `checkpointed_layers` of the model.
        lengths: tokens of each sequence. The last one is never fed: nothing is predicted from it.
        width: of the hidden states.
    """

    def __init__(
        self, layers: list[Any], lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._device = layers, device
        self._begins = [0, *accumulate(length - 1 for length in lengths)]
        size = self._begins[-1] + 1
        self._outputs_SH = [torch.zeros(size, width, dtype=dtype, device=device) for _ in layers]
        self._places_N = torch.empty(0, dtype=torch.long)

    def expect(self, pieces: Sequence[Piece]) -> None:
        """The next call feeds these, in this order."""
        places = [self._begins[piece.sequence] + slot for piece in pieces for slot in range(piece.begin, piece.end)]
        (self._places_N,) = on_device([places], self._device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what the layers give for the tokens of a call replaces what was recorded at their positions."""

        def keep(number: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                hidden_1NH = output[0] if isinstance(output, tuple) else output
                self._outputs_SH[number][self._places_N] = hidden_1NH[0]

            return hook

        handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self, sequences: Sequence[int]) -> Iterator[None]:
        """Inside, a packed forward of these sequences in training mode takes the recorded outputs; keep it open for the
        backward."""
        nothing = self._begins[-1]  # the row of zeros: whatever is there, no loss comes from the last token
        places = [
            place for number in sequences for place in [*range(self._begins[number], self._begins[number + 1]), nothing]
        ]
        (places_N,) = on_device([places], self._device)
        before = [layer._gradient_checkpointing_func for layer in self._layers]
        for layer, outputs_SH in zip(self._layers, self._outputs_SH, strict=True):
            layer._gradient_checkpointing_func = _replay(outputs_SH, places_N)
        try:
            yield
        finally:
            for layer, function in zip(self._layers, before, strict=True):
                layer._gradient_checkpointing_func = function


def _replay(outputs_SH: torch.Tensor, places_N: torch.Tensor) -> Callable[..., torch.Tensor]:
    def checkpoint(function: Callable[..., Any], hidden_1NH: torch.Tensor, *rest: Any) -> torch.Tensor:
        return _Replay.apply(hidden_1NH, outputs_SH[places_N][None], function, rest)

    return checkpoint


class _Replay(torch.autograd.Function):
    """A layer whose output is known; its backward computes it once, as checkpointing does."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, output: torch.Tensor, function: Any, rest: Any) -> torch.Tensor:
        ctx.function, ctx.rest = function, rest
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.rest)
        torch.autograd.backward(output[0] if isinstance(output, tuple) else output, upstream)
        return hidden.grad, None, None, None

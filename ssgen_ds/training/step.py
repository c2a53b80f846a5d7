"""ONE optimizer step: window -> loss -> backward -> step -> StepStats.

    loss = sum(w_i * nll_i) / sum(w_i)     over all label tokens of the window, on all ranks

DeepSpeed averages gradients over ranks, so each rank's part is multiplied by their number; and it must not divide by
the accumulation steps, because the one division by the global weight already covers them (docs/method.md).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ssgen_ds.data.window import Window
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.loss import token_loss
from ssgen_ds.modeling.packed import packed_attention


@dataclass(frozen=True)
class StepStats:
    loss: float  # nats per unit of label weight
    grad_norm: float  # global, before clipping
    is_applied: bool = True  # False: not finite somewhere, so weights and moments stayed as they were, on every rank


# ----------------------------------------------------------------------------------------------------------------------
def train_step(
    engine: Any, window: Window, lr: float, world: World, replays: list[AbstractContextManager[None]] | None = None
) -> StepStats:
    """One update of the weights from one window, or none when it is not finite; the same on every rank.

    Args:
        replays: what each micro batch is to be computed in, where its forward was computed before.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate_gradients(engine, window, world, replays)
    grad_norm = _local_grad_norm(engine)
    if world.any(not math.isfinite(grad_norm)):
        engine.zero_grad()
        return StepStats(loss, grad_norm, is_applied=False)
    with world.phase("optimizer"):
        engine.step()
    if engine.get_global_grad_norm() is not None:
        grad_norm = float(engine.get_global_grad_norm())
    # With ZeRO or bfloat16, DeepSpeed looks at all ranks' gradients and leaves the update out by itself.
    is_applied = engine.was_step_applied()
    return StepStats(loss, grad_norm if is_applied else math.nan, is_applied)


def accumulate_gradients(
    engine: Any, window: Window, world: World, replays: list[AbstractContextManager[None]] | None = None
) -> float:
    """Forward and backward of all micro batches; the window's loss over all ranks, in nats per unit of weight.

    When the loss is not finite on some rank, all gradients become NaN: the loss can be infinite where its gradient is
    not, and one check, that of the gradient, then keeps the weights at every stage.
    """
    # Kept on the device until the last micro batch: reading it earlier would make the host wait at each.
    weighted_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    loss = math.nan
    last = len(window.micro_batches) - 1
    for i, batch in enumerate(window.micro_batches):
        engine.set_gradient_accumulation_boundary(i == last)
        replay = nullcontext() if replays is None else replays[i]
        with packed_attention(engine.module, batch.layout) as attention, replay:
            with world.phase("forward"):
                micro_sum = token_loss(engine, batch, attention=attention)
            weighted_sum += micro_sum.detach()
            scale = world.size / window.global_weight
            if i == last:
                loss = world.sum(weighted_sum.item())[0] / window.global_weight
                scale = scale if math.isfinite(loss) else math.nan
            with world.phase("backward"):
                engine.backward(micro_sum * scale, scale_wrt_gas=False)
    return loss


# ----------------------------------------------------------------------------------------------------------------------


def _local_grad_norm(engine: Any) -> float:
    """Norm of the reduced gradients where DeepSpeed does not look at them itself: plain float32 without ZeRO."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return 0.0
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()

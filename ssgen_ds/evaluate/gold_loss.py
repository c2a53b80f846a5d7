"""The loss on the gold responses of the evaluation examples, measured on all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssgen_ds.data.window import Packing, Sequence, Window, build_window
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.cached import inference_mode
from ssgen_ds.modeling.loss import token_loss


@dataclass(frozen=True)
class GoldLoss:
    """Measures the same sequences again and again, with the weights as they are at the time."""

    engine: Any
    sequences: list[Sequence]
    packing: Packing
    world: World

    def measure(self) -> dict[str, float]:
        """Columns of metrics.jsonl: the mean loss in nats per label, and the number of labels."""
        window = build_window(self.sequences, self.packing, self.world.rank, self.world.size, self.world.device)
        with inference_mode(self.engine.module):
            loss = window_loss(self.engine.module, window, self.world)
        return {"eval_loss": loss, "eval_num_tokens": window.num_labels}


@torch.no_grad()
def window_loss(module: Any, window: Window, world: World) -> float:
    """The loss of a window, in nats per label, without a gradient. The caller puts the model in eval mode."""
    weighted_sum = sum(token_loss(module, batch).item() for batch in window.micro_batches)
    return world.sum(weighted_sum)[0] / window.global_weight

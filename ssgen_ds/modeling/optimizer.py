"""The optimizer that the recipe names, over the trainable parameters."""

from __future__ import annotations

from typing import Any

import torch

from ssgen_ds.modeling.adapters import param_groups
from ssgen_ds.recipe.deepspeed import offloads_optimizer
from ssgen_ds.recipe.schema import TrainConfig


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW in float32, on the host where DeepSpeed offloads it, or bitsandbytes' with 8-bit moments.

    Paged moments leave the GPU when it needs the room; on a CPU they are the same as unpaged.
    """
    groups = param_groups(model, train.weight_decay)
    adam: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer != "adamw":
        import bitsandbytes as bnb

        paged = train.optimizer == "paged_adamw_8bit" and torch.cuda.is_available()
        return (bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit)(groups, **adam)
    if offloads_optimizer(ds_config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **adam)
    # Fused: one pass over each parameter, without copies as large as all of them.
    return torch.optim.AdamW(groups, **adam, fused=True)

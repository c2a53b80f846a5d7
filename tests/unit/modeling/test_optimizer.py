"""The recipe's optimizer over the parameters that train."""

from __future__ import annotations

import pytest
import torch

from ssgen_ds.modeling.optimizer import build_optimizer
from ssgen_ds.recipe.schema import TrainConfig
from tests.support.tiny_models import tiny_model


def settings(**changes: object) -> TrainConfig:
    return TrainConfig(lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1, max_steps=1, global_batch=1, **changes)


def test_adamw_has_the_recipes_settings_and_only_what_trains() -> None:
    model = tiny_model("llama")
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = build_optimizer(model, settings(), {"zero_optimization": {"stage": 0}})
    assert type(optimizer) is torch.optim.AdamW
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad} and id(frozen) not in trained
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"])) == (1e-3, (0.8, 0.9))
        decays = {p.dim() > 1 for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}, "matrices decay, vectors do not"


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_moments(name: str) -> None:
    """Nothing is paged without a GPU."""
    import bitsandbytes as bnb

    optimizer = build_optimizer(tiny_model("llama"), settings(optimizer=name), {"zero_optimization": {"stage": 1}})
    assert type(optimizer) is bnb.optim.AdamW8bit

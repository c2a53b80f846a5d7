"""What `plan` counts for the recipes shipped, against what their models allocate at real sizes, on meta tensors."""

from __future__ import annotations

import functools

import pytest
import torch

from ssgen_ds.data.window import Sequence, collate
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.loss import token_loss
from ssgen_ds.modeling.packed import packed_attention
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.plan.memory import MemoryPlan, Setting
from ssgen_ds.plan.run import Hardware, plan_recipe
from ssgen_ds.plan.sizes import Sizes, _build, find_config
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.sampler.draw import draws_at_once
from tests.support.meta_memory import counted
from tests.support.shipped_recipes import EVERY, RECIPES

GIB = 2.0**30
FOR_GPUS = [path for path in EVERY if path not in RECIPES]
CARDS = {"12 GiB": 12 * GIB, "16 GiB": 16 * GIB, "24 GiB": 24 * GIB, "48 GiB": 48 * GIB, "80 GB": 80e9}
ROOM = 1.02  # of the whole device, for what a plan leaves out


def planned(path, memory: float) -> tuple[Recipe, MemoryPlan, Sizes, Setting]:
    recipe = load_recipe(path, ["data.train=x"])
    ranks = 16 if "nodes" in path.stem else 8 if "8gpu" in path.stem else 1
    return recipe, *plan_recipe(recipe, Hardware(min(ranks, 8), max(1, ranks // 8), memory, "", False))


@functools.cache
def shallow(path) -> torch.nn.Module:
    """Two layers of a recipe's model: what one layer holds while it computes does not depend on their number."""
    recipe = load_recipe(path, ["data.train=x"])
    config, _ = find_config(recipe)
    model = _build(config, torch.bfloat16, 2)
    if recipe.adapter.kind == "lora":
        with torch.device("meta"):
            model = apply_adapter(model, recipe.adapter, None, seed=0)
    return model.to(torch.bfloat16).to("meta").eval()


def generated(model: torch.nn.Module, rows: int, row_tokens: int, tokens: int, logits: int) -> float:
    """Bytes of a call that feeds `tokens` of prompts and wants so many logits, the cache apart, and of its draws."""
    lengths = [row_tokens] * (tokens // row_tokens) + ([tokens % row_tokens] if tokens % row_tokens else [])
    pieces, left = [], logits
    for row, length in enumerate(lengths):
        wanted = min(left, length)
        pieces.append(Piece(row, 0, [5] * length, range(length - wanted, length)))
        left -= wanted
    with torch.no_grad(), counted(model) as counter:
        cached = CachedCausalLM(model, device="meta")
        cached.open(max(rows, len(pieces)), row_tokens)
        kept = cached(pieces)
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached._layers)
        scores = kept[: draws_at_once(kept.shape[-1], is_cpu=False)].float()
        noise = torch.empty_like(scores)
        (scores / 0.9 + noise).topk(2)
    return counter.peak - cache


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_a_call_takes_what_is_planned_and_fits(path, card):
    """Found in an audit: the first call reads all prompts at once, and took five times what the plan counted."""
    recipe, plan, _, setting = planned(path, CARDS[card])
    if not recipe.generates or setting.memory < plan.peak("load"):
        pytest.skip("not even the weights fit")
    parts = plan.phases["generate"]
    found = generated(shallow(path).eval(), plan.cache_rows, setting.row_tokens, plan.call.tokens, plan.call.logits)
    assert found == pytest.approx(parts["activations"] + parts["logits"], rel=0.15)
    if plan.peak("generate") <= setting.memory:
        assert plan.peak("generate") - parts["activations"] - parts["logits"] + found <= ROOM * setting.memory


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_a_micro_step_takes_what_is_planned(path):
    """Forward and backward of two layers in bfloat16, and for each further layer the input that checkpointing keeps."""
    recipe, plan, sizes, setting = planned(path, 80e9)
    assert setting.checkpointing, "what follows counts on it"
    parts = plan.phases["train"]
    model = shallow(path).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.adapter.kind == "lora":
        model.enable_input_require_grads()
    else:
        model.requires_grad_(True)
    row = [-100] * (setting.micro_tokens - setting.labels) + [7] * setting.labels
    with counted(model) as counter:
        batch = collate([Sequence([5] * len(row), row)], "meta", is_packed=True)
        with packed_attention(model, batch.layout) as attention:
            token_loss(model, batch, attention=attention).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    # Gradients come while activations go: the plan counts what is the larger of them.
    found = counter.peak - gradients + (sizes.layers - 2) * setting.micro_tokens * sizes.hidden * setting.element
    planned_bytes = parts["activations"] + parts["logits"]
    assert 0 <= found <= 1.05 * planned_bytes
    assert plan.peak("train") == pytest.approx(plan.peak("train") - planned_bytes + found, rel=0.15)

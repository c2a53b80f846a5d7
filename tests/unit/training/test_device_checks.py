"""GPUs that cannot do what a recipe asks: what is said of them, on every rank and before any weight is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.training.device_checks import DeviceFacts, device_facts, device_problems

CARD = DeviceFacts("cuda", "RTX 4090 (GPU 0 of here)", 24 * GIB, 23 * GIB)


def problems(name: str, *ranks: DeviceFacts, dtype: str = "bfloat16", overrides: tuple[str, ...] = ()) -> list[str]:
    recipe = load_recipe(f"recipes/{name}.yaml", ["data.train=x", *overrides])
    return device_problems(recipe, dtype, list(ranks))


def test_a_card_that_holds_the_recipe_is_not_remarked_on():
    assert problems("llama8b_lora_24gb", CARD) == []
    assert problems("llama8b_full_8gpu", *[replace(CARD, total=80e9, free=79e9)] * 8) == []
    assert problems("smoke", DeviceFacts("cpu"), dtype="float32") == []


def test_a_card_that_is_too_small_is_named_with_what_would_fit():
    small = replace(CARD, name="RTX 4070 (GPU 0 of here)", total=12 * GIB, free=11.8 * GIB)
    (problem,) = problems("llama8b_lora_24gb", small)
    assert problem.startswith("model.path: weights and optimizer take 16")
    assert problem.endswith("RTX 4070 (GPU 0 of here) has 12; set deepspeed=ds_configs/zero3_offload.json")


def test_the_poorest_card_counts_and_what_others_use_of_it_is_told():
    (problem,) = problems(
        "llama8b_full_8gpu", *[replace(CARD, total=80e9, free=79e9)] * 7, replace(CARD, total=80e9, free=5e9)
    )
    assert "of which others use 69.8; end what `nvidia-smi` shows there" in problem


def test_a_card_without_bfloat16_is_named():
    old = replace(CARD, name="Tesla V100 (GPU 0 of here)", total=80e9, free=79e9, has_bfloat16=False)
    assert problems("llama8b_lora_24gb", old, old) == [
        "model.dtype: Tesla V100 (GPU 0 of here) cannot compute in bfloat16; set model.dtype=float32"
    ]
    assert problems("llama8b_lora_24gb", old, dtype="float32", overrides=("model.dtype=float32",)) == []


def test_flash_attention_needs_a_gpu_and_bfloat16():
    asked = ("model.attention=flash_attention_2",)
    for rank, dtype in ((DeviceFacts("cpu"), "float32"), (CARD, "float32")):
        (problem,) = problems("smoke", rank, dtype=dtype, overrides=asked)
        assert problem.endswith("set model.attention=sdpa")
    assert problems("llama8b_lora_24gb", CARD, overrides=asked) == []


def test_the_facts_are_those_that_cuda_tells(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    facts = device_facts(torch.device("cuda", 2))
    assert (facts.total, facts.free, facts.has_bfloat16) == (5.0, 3.0, False)
    assert facts.name.startswith("A card (GPU 2 of ")
    assert device_facts(torch.device("cpu")) == DeviceFacts("cpu")


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_flash_attn_is_told_without_torch(installed, monkeypatch):
    from ssgen_ds.modeling import preflight

    monkeypatch.setattr(preflight, "find_spec", lambda name: object() if installed else None)
    recipe = load_recipe("recipes/smoke.yaml", ["model.attention=flash_attention_2"])
    told = [problem for problem in preflight.input_problems(recipe) if "flash" in problem]
    assert len(told) == (0 if installed else 1)
    assert installed or "pip install flash-attn --no-build-isolation, or set model.attention=sdpa" in told[0]

"""The quantised base: one set of numbers for training, generation and the merged model."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ssgen_ds.inference.model_source import load_model_source, resolve_model_source
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.modeling.merge import merge_adapter
from ssgen_ds.modeling.model_folder import Notes, TrainedAs
from ssgen_ds.modeling.nf4 import Nf4Linear, dequantized, dequantized_bytes, nf4_layers
from ssgen_ds.modeling.quantization import quantization_problems, slow_quantization
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig, QuantizationConfig
from tests.support.tiny_models import save_tiny_model

LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
NF4 = QuantizationConfig(kind="nf4")
IDS = torch.arange(3, 23)[None]
# The 16 values of nf4: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
NF4_VALUES = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def folder(request, tmp_path):
    save_tiny_model(request.param, tmp_path / request.param)
    return str(tmp_path / request.param)


def quantized(folder: str, **settings) -> torch.nn.Module:
    quantization = QuantizationConfig(kind="nf4", **settings)
    return load_model(ModelConfig(path=folder), LORA, {}, device="cpu", quantization=quantization)


def test_every_linear_layer_but_the_head_is_quantised(folder):
    model = quantized(folder)
    assert len(nf4_layers(model)) == (8 if "gpt2" in folder else 14)
    assert not isinstance(model.get_output_embeddings(), Nf4Linear)
    weights = sum(torch.Size(layer.weight.quant_state.shape).numel() for layer in nf4_layers(model))
    assert sum(layer.weight.numel() * 4 for layer in nf4_layers(model)) == weights // 2
    assert dequantized_bytes(model) == 4 * weights


def test_weights_are_the_nearest_of_the_sixteen_values_of_their_block(tmp_path):
    save_tiny_model("llama", tmp_path / "llama")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").model.layers[0].mlp.up_proj.weight.detach()
    layer = quantized(str(tmp_path / "llama"), double=False).model.layers[0].mlp.up_proj
    blocks = original.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = NF4_VALUES[((blocks / scales)[..., None] - NF4_VALUES).abs().argmin(-1)] * scales
    found = layer(torch.eye(original.shape[1])).detach().T
    assert torch.allclose(found, nearest.view_as(original), atol=1e-6)


def test_eval_mode_and_dequantised_weights_give_the_numbers_of_training(folder):
    model = quantized(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2 has some
            module.p = 0.0
    with_gradient = model.train()(IDS, use_cache=False).logits
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, with_gradient)
        with dequantized(model):
            assert all(layer.whole is not None for layer in nf4_layers(model))
            assert torch.equal(model(IDS).logits, with_gradient)
    assert all(layer.whole is None for layer in nf4_layers(model))


def test_the_gradient_is_that_of_the_dequantised_layer_also_when_weights_leave_in_between(folder):
    """ZeRO-3 empties the parameter after the forward and refills it before the backward."""
    layer = nf4_layers(quantized(folder))[0]
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        whole = layer(torch.eye(layer.in_features)).T - (0 if layer.bias is None else layer.bias[:, None])
    output = layer(x)
    codes = layer.weight.data.clone()
    storage = weakref.ref(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0)
    gc.collect()
    assert storage() is None, "the graph keeps the weights"
    layer.weight.data = codes
    output.square().sum().backward()
    assert torch.allclose(x.grad, 2 * output.detach() @ whole, atol=1e-4)


def trained(folder: str) -> torch.nn.Module:
    model = apply_adapter(quantized(folder), LORA, None, seed=0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model.eval()


def test_a_merged_model_has_the_logits_of_adapter_and_quantised_base(folder, tmp_path):
    """Merged into the original weights instead, the logits would be off by the whole rounding of the quantisation."""
    model = trained(folder)
    how = TrainedAs(2, None, Notes(quantization=NF4))
    tokenizer = load_tokenizer(ModelConfig(path=folder))
    save_model(model, tokenizer, tmp_path / "adapter", folder, is_main=True, trained=how)
    again = load_model_source(resolve_model_source(str(tmp_path / "adapter")), "cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits), "the base of an adapter is quantised as it was"
    assert (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == get_peft_model_state_dict(model).keys()
    )
    base = ModelConfig(path=folder)
    difference = merge_adapter(base, str(tmp_path / "adapter"), tmp_path / "merged", torch.float32, NF4, how)
    assert resolve_model_source(str(tmp_path / "merged")).quantization is None
    merge_adapter(base, str(tmp_path / "adapter"), tmp_path / "elsewhere", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (merged(IDS).logits - wanted).abs().max() == pytest.approx(difference, abs=1e-5)
        assert difference < 1e-4
        assert (elsewhere(IDS).logits - wanted).abs().max() > 0.05


def recipe_of(**sections):
    raw = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"max_steps": 1}, "output_dir": "r"}
    return parse_recipe(raw | sections)


def test_a_missing_package_is_named_with_what_asked_for_it(monkeypatch):
    asks = recipe_of(
        adapter={"kind": "lora"},
        quantization={"kind": "nf4"},
        train={"max_steps": 1, "optimizer": "paged_adamw_8bit"},
    )
    assert quantization_problems(asks) == []
    monkeypatch.setattr("ssgen_ds.modeling.quantization.find_spec", lambda name: None)
    (problem,) = quantization_problems(asks)
    assert problem.startswith("quantization.kind=nf4 and train.optimizer=paged_adamw_8bit: the package bitsandbytes")
    assert "pip install 'ssgen-ds[qlora]'" in problem
    assert quantization_problems(recipe_of()) == []


def test_a_quantised_base_without_cuda_is_told_of_beforehand():
    asks = recipe_of(adapter={"kind": "lora"}, quantization={"kind": "nf4"})
    assert slow_quantization(asks, "cpu").startswith("quantization.kind=nf4 without CUDA: ")
    assert "install a torch that is built for this machine's GPU" in slow_quantization(asks, "cpu")
    assert slow_quantization(asks, "cuda") == slow_quantization(recipe_of(), "cpu") == ""


def test_a_native_library_that_did_not_load_is_told(monkeypatch):
    cextension = sys.modules["bitsandbytes.cextension"]
    monkeypatch.setattr(cextension, "lib", object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary))
    (problem,) = quantization_problems(recipe_of(adapter={"kind": "lora"}, quantization={"kind": "nf4"}))
    assert "the compiled library of bitsandbytes did not load" in problem

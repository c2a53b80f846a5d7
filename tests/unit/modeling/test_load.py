"""Paths, tokenizers and whole (unpartitioned) models, and what is written back."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.gather import full_state_dict
from ssgen_ds.modeling.load import load_config, load_model, load_tokenizer, resolve_dtype, set_leaf_modules
from ssgen_ds.modeling.merge import merge_adapter
from ssgen_ds.modeling.model_path import ModelPath, resolve_model_path, split_adapter
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.tiny_models import FAMILIES, save_tiny_model, tiny_model

NO_ADAPTER = AdapterConfig()
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    save_tiny_model("llama", folder)
    return str(folder)


def _trained_adapter(base: str, seed: int = 0):
    model = apply_adapter(load_model(ModelConfig(path=base), LORA, {}, device="cpu"), LORA, None, seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model.eval()


def test_paths_are_told_apart(llama, tmp_path):
    assert resolve_model_path(llama) == ModelPath(llama)
    assert resolve_model_path("owner/model", "v1") == ModelPath("owner/model", "v1")
    for path in ("/no/such/folder", "./nowhere", "../nowhere", "runs/one/model"):
        with pytest.raises(UserError, match="no such file or folder"):
            resolve_model_path(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model_path(str(tmp_path / "empty"))


def test_an_adapter_folder_is_split_into_base_and_adapter(llama, tmp_path):
    out = str(tmp_path / "adapter")
    save_model(_trained_adapter(llama), load_tokenizer(ModelConfig(path=llama)), out, llama, is_main=True)
    assert split_adapter(out) == (llama, out)
    assert split_adapter(llama) == (llama, None)
    with pytest.raises(UserError, match=r"is an adapter: .*model\.adapter_path"):
        resolve_model_path(out)


def test_an_unreachable_hub_id_is_a_user_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError, match=r"model\.path: cannot load nobody/nothing"):
            load(ModelConfig(path="nobody/nothing"))


def test_pad_falls_back_to_eos_and_never_reaches_the_saved_eos_list(llama, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(path=llama))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    model = load_model(ModelConfig(path=llama), NO_ADAPTER, {}, device="cpu")
    save_model(model, tokenizer, tmp_path / "out", llama, is_main=True)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation.get("pad_token_id") is None


def test_a_tokenizer_without_eos_is_refused(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(llama)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(ModelConfig(path=llama))


def test_auto_dtype_is_float32_on_a_cpu_only():
    config = ModelConfig(path="x")
    assert resolve_dtype(config, "cpu") == torch.float32
    assert resolve_dtype(config, "cuda") == torch.bfloat16
    assert resolve_dtype(ModelConfig(path="x", dtype="bfloat16"), "cpu") == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_a_full_save_as_it_was(family, tmp_path):
    original = save_tiny_model(family, tmp_path / "in")
    model = load_model(ModelConfig(path=str(tmp_path / "in")), NO_ADAPTER, {}, device="cpu")
    assert not model.training and model.config.use_cache is False
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "in")))
    save_model(model, tokenizer, tmp_path / "out", "unused", is_main=True)
    assert model.config.use_cache is False, "saving must not change the model in training"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.config.use_cache is True
    original.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, original(IDS).logits)


def test_only_the_main_rank_writes(llama, tmp_path):
    model = load_model(ModelConfig(path=llama), NO_ADAPTER, {}, device="cpu")
    save_model(model, load_tokenizer(ModelConfig(path=llama)), tmp_path / "out", llama, is_main=False)
    assert not (tmp_path / "out").exists()


def test_attention_is_chosen_by_the_model_and_a_wrong_choice_is_refused(tmp_path):
    save_tiny_model("gemma2", tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)), NO_ADAPTER, {}, device="cpu")
    assert model.config._attn_implementation == "eager"  # SDPA has no soft-capping
    with pytest.raises(UserError, match="cannot load"):
        load_model(ModelConfig(path=str(tmp_path), attention="sdpa"), NO_ADAPTER, {}, device="cpu")


def test_gradient_checkpointing_gives_the_same_gradients(llama):
    def gradients(checkpointing):
        config = ModelConfig(path=llama, gradient_checkpointing=checkpointing)
        model = apply_adapter(load_model(config, LORA, {}, device="cpu"), LORA, None, seed=0).train()
        model(IDS, labels=IDS).loss.backward()
        assert model.base_model.model.model.gradient_checkpointing is checkpointing
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    assert all(torch.allclose(checkpointed[name], plain[name], atol=1e-7) for name in plain)


def test_a_saved_adapter_loads_with_peft_alone(llama, tmp_path):
    model = _trained_adapter(llama)
    save_model(model, load_tokenizer(ModelConfig(path=llama)), tmp_path / "out", llama, is_main=True)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, found = model(IDS).logits, again(IDS).logits
        base = load_model(ModelConfig(path=llama), NO_ADAPTER, {}, device="cpu")(IDS).logits
    assert torch.equal(found, expected)
    assert (expected - base).abs().max() > 0.01
    assert not list((tmp_path / "out").glob("model*.safetensors"))


def test_a_merged_adapter_is_a_plain_model_with_the_same_logits(llama, tmp_path):
    model = _trained_adapter(llama)
    save_model(model, load_tokenizer(ModelConfig(path=llama)), tmp_path / "adapter", llama, is_main=True)
    difference = merge_adapter(ModelConfig(path=llama), str(tmp_path / "adapter"), tmp_path / "merged", torch.float32)
    assert difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.use_cache is True
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, model(IDS).logits, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(llama, tmp_path):
    save_model(_trained_adapter(llama), load_tokenizer(ModelConfig(path=llama)), tmp_path / "out", llama, is_main=True)
    save_tiny_model("llama", tmp_path / "wide", hidden_size=64)
    with pytest.raises(UserError, match="does not fit"):
        merge_adapter(ModelConfig(path=str(tmp_path / "wide")), str(tmp_path / "out"), tmp_path / "m", torch.float32)


def test_a_generation_config_that_cannot_be_saved_is_mended_on_the_way_out(llama, tmp_path):
    model = load_model(ModelConfig(path=llama), NO_ADAPTER, {}, device="cpu")
    model.generation_config.temperature = 0.6  # with do_sample off: Llama 2 was published so
    save_model(model, load_tokenizer(ModelConfig(path=llama)), tmp_path / "out", llama, is_main=True)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["do_sample"] is True
    assert not model.generation_config.do_sample


def test_full_state_dict_copies_and_keeps_ties():
    model = tiny_model("llama")
    state = full_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert not torch.equal(state["model.norm.weight"], model.model.norm.weight)
    adapted = apply_adapter(model, LORA, None, seed=0)
    assert all("lora_" in name for name in full_state_dict(adapted, trainable_only=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_expert_blocks_are_found(family):
    from transformers import AutoConfig

    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **experts))
    (name,) = set_leaf_modules(model)
    assert name.endswith("SparseMoeBlock")
    assert sum(module._z3_leaf for module in model.modules() if hasattr(module, "_z3_leaf")) == 2
    assert set_leaf_modules(tiny_model("llama")) == []


QUANTIZED = {
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_base_that_is_already_quantised_is_refused_from_its_configuration(method, llama):
    from pathlib import Path

    file = Path(llama) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": QUANTIZED[method]}))
    (Path(llama) / "model.safetensors").unlink()  # no weight is read
    for read in (load_config, lambda config: load_model(config, NO_ADAPTER, {}, device="cpu")):
        with pytest.raises(UserError, match=rf"already quantised .*{method}.*quantization\.kind=nf4"):
            read(ModelConfig(path=llama))

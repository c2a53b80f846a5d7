"""LoRA and the optimizer's parameter groups on tiny models, in one process."""

from __future__ import annotations

import pytest
import torch

from ssgen_ds.config import AdapterConfig
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter, linear_names, param_groups
from tests.support.tiny_models import FAMILIES, tiny_model

LORA = AdapterConfig(kind="lora", rank=4, alpha=8)


def _adapter_weights(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains_and_it_starts_as_the_base(family):
    base = tiny_model(family)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = apply_adapter(base, LORA, None, seed=0).eval()
        assert torch.equal(model(ids).logits, before)
    trainable = _adapter_weights(model)
    assert trainable and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name or "embed_out" in name for name in trainable)


def test_the_seed_alone_decides_the_weights_and_the_callers_random_state_is_left_alone():
    def weights(seed, noise):
        torch.manual_seed(noise)
        model = apply_adapter(tiny_model("llama"), LORA, None, seed)
        return torch.cat([value.flatten() for value in _adapter_weights(model).values()]), torch.rand(1)

    one, after_one = weights(seed=5, noise=1)
    two, _ = weights(seed=5, noise=2)
    three, _ = weights(seed=6, noise=1)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.manual_seed(1)
    assert torch.equal(after_one, torch.rand(1))


def test_the_adapter_has_the_dtype_of_its_base():
    model = apply_adapter(tiny_model("llama").bfloat16(), LORA, None, seed=0)
    assert {value.dtype for value in _adapter_weights(model).values()} == {torch.bfloat16}


def test_a_saved_adapter_goes_on_training(tmp_path):
    model = apply_adapter(tiny_model("llama"), LORA, None, seed=0)
    with torch.no_grad():
        for value in _adapter_weights(model).values():
            value.add_(0.5)
    model.save_pretrained(tmp_path)
    again = apply_adapter(tiny_model("llama"), LORA, str(tmp_path), seed=9)
    expected = _adapter_weights(model)
    found = _adapter_weights(again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unknown_target_modules_are_named_with_those_there_are():
    config = AdapterConfig(kind="lora", target_modules=["q_proj", "query", "wv"])
    with pytest.raises(UserError) as error:
        apply_adapter(tiny_model("llama"), config, None, seed=0)
    assert "query, wv: no such modules; there are down_proj, gate_proj, k_proj" in str(error.value)
    with pytest.raises(UserError, match="names no module"):
        apply_adapter(tiny_model("llama"), AdapterConfig(kind="lora", target_modules=[]), None, seed=0)
    with pytest.raises(UserError, match="no such modules"):
        apply_adapter(tiny_model("llama"), AdapterConfig(kind="lora", target_modules=".*wq"), None, seed=0)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        apply_adapter(tiny_model("llama"), LORA, str(tmp_path), seed=0)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no adapter weights"):
        apply_adapter(tiny_model("llama"), LORA, str(tmp_path), seed=0)


def test_linear_names_leaves_the_output_head_out():
    assert linear_names(tiny_model("gpt2")) == ["c_attn", "c_fc", "c_proj"]
    assert "embed_out" not in linear_names(tiny_model("gpt_neox"))


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = tiny_model("gpt2")
    decay, keep = param_groups(model, 0.1)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    # 4 matrices a layer and 2 embeddings (the head is tied); 8 vectors a layer and the last norm's 2
    assert (len(decay["params"]), len(keep["params"])) == (2 * 4 + 2, 2 * 8 + 2)
    assert any(parameter is model.transformer.wte.weight for parameter in decay["params"])
    assert all(parameter.ndim == 1 for parameter in keep["params"])


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = apply_adapter(tiny_model("llama"), LORA, None, seed=0)
    (group,) = param_groups(model, 0.1)
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 2 * 7 * 2  # layers x projections x (A, B)


def test_placeholders_of_partitioned_parameters_are_judged_by_their_true_shape():
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        parameter.data = torch.empty(0)
    decay, keep = param_groups(model, 0.1)
    assert decay["params"] == [model.weight] and keep["params"] == [model.bias]

"""LoRA and the optimizer's parameter groups on tiny models, in one process."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapter_checks import adapter_problems, target_problems
from ssgen_ds.modeling.adapters import apply_adapter, linear_names, param_groups
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import AdapterConfig
from tests.support.tiny_models import FAMILIES, tiny_config, tiny_model

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


EXPERTS = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16,
}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("mixtral", ATTENTION),
        ("qwen3_moe", ATTENTION),
        ("olmoe", ATTENTION),
        ("gpt_oss", ATTENTION),
        ("qwen2_moe", ATTENTION | {"gate_proj", "up_proj", "down_proj"}),  # of the shared expert
    ],
)
def test_neither_routers_nor_fused_experts_are_trained_unasked(family, adapted):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS))
    trained = _adapter_weights(apply_adapter(model, LORA, None, seed=0))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == adapted


@pytest.mark.parametrize(
    ("family", "targets", "refused_at", "named"),
    [
        ("llama", "all-linear", (), ""),
        ("llama", ["q_proj", "lm_head"], (), ""),
        ("gpt2", ["c_attn"], (), ""),
        ("llama", ["q_proj", "embed_tokens"], (3,), "embed_tokens: no Linear layers"),
        ("qwen3_moe", ["q_proj", "gate"], (3,), "gate: no Linear layers"),
        ("llama", ["q_proj", "wv"], (2, 3), "wv: no such modules"),
        ("llama", ["q_proj", "norm"], (2, 3), "LlamaRMSNorm"),
        ("llama", ["mlp"], (2, 3), "LlamaMLP"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named_before_weights_are_read(family, targets, refused_at, named, tmp_path):
    config = AutoConfig.for_model(family, **EXPERTS) if family == "qwen3_moe" else tiny_config(family)
    config.save_pretrained(tmp_path)  # no weights at all
    raw = {"model": {"path": str(tmp_path)}, "data": {"train": "d"}, "train": {"max_steps": 1}, "output_dir": "r"}
    recipe = parse_recipe(raw | {"adapter": {"kind": "lora", "target_modules": targets}})
    for stage in (2, 3):
        problems = target_problems(recipe, stage)
        assert len(problems) == (stage in refused_at), problems
        for problem in problems:
            assert problem.startswith("adapter.target_modules: ") and named in problem
            assert ("c_attn" if family == "gpt2" else "q_proj") in problem.rpartition(named)[2], "what there is"


def test_an_adapter_with_tensors_missing_or_of_another_model_is_refused(tmp_path):
    model = apply_adapter(tiny_model("llama"), LORA, None, seed=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        apply_adapter(tiny_model("llama", hidden_size=64), LORA, str(tmp_path), seed=0)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if "layers.1.mlp.up_proj" not in name}, file)
    with pytest.raises(UserError, match=r"lacks .*layers\.1\.mlp\.up_proj\.lora_A.* and 1 more"):
        apply_adapter(tiny_model("llama"), LORA, str(tmp_path), seed=0)
    save_file({**state, "base_model.model.model.layers.9.q_proj.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"has no place for .*layers\.9"):
        apply_adapter(tiny_model("llama"), LORA, str(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("settings", "refused_at"),
    [
        ({}, ()),
        ({"use_rslora": True}, ()),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}, ()),
        ({"modules_to_save": ["lm_head"]}, (3,)),
        ({"bias": "lora_only"}, (3,)),
        ({"use_dora": True}, (3,)),
        ({"trainable_token_indices": [3, 4]}, (3,)),
        ({"target_parameters": ["gate_up_proj"]}, (3,)),
        ({"target_modules": ["q_proj", "embed_tokens"]}, (3,)),
        ({"init_lora_weights": "pissa"}, (0, 3)),
        ({"layer_replication": [[0, 1], [0, 2]]}, (0, 3)),
        ({"peft_type": "IA3"}, (0, 3)),
        ({"of_next_year": 1}, (0, 3)),
    ],
)
def test_what_an_adapter_from_elsewhere_asks_for_is_trained_or_refused_by_name(settings, refused_at, tmp_path):
    config = {**LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict(), "peft_type": "LORA"}
    config = json.loads(json.dumps({**config, **settings}, default=lambda value: sorted(value)))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()  # told from the configuration alone
    for stage in (0, 3):
        problems = adapter_problems(str(tmp_path), stage)
        assert bool(problems) is (stage in refused_at), problems
        assert all(name in problems[0] or settings[name] in problems[0] for name in settings if problems)

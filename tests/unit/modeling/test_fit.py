"""Checkpoints whose tensors are not the model's are refused by name; what can be loaded rightly is."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssgen_ds.errors import UserError
from ssgen_ds.modeling import convert, zero3
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from ssgen_ds.run.index_file import WEIGHT_INDEX
from tests.support.tiny_models import save_tiny_model

IDS = torch.arange(3, 23)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def change(tmp_path):
    """Write a tiny model, its tensors changed by a function, and return the folder."""

    def write(function, family="qwen2", **overrides):
        folder = tmp_path / family
        save_tiny_model(family, folder, **overrides)
        state = load_file(folder / "model.safetensors")
        save_file(function(state), folder / "model.safetensors")
        return folder

    return write


def load(folder):
    return load_model(ModelConfig(path=str(folder)), AdapterConfig(), {}, device="cpu")


def convert_like_zero3(folder, tmp_path):
    """What a ZeRO-3 start does with a checkpoint whose tensors do not match; in this process, to be quick."""
    (tmp_path / "converted").mkdir(exist_ok=True)
    convert.write_checkpoint(str(folder), "", "0", tmp_path / "converted")


NOT_THE_MODELS = {
    "no head": (lambda state: drop(state, HEAD), "missing.*lm_head.weight.*tie_word"),
    "no layer": (lambda state: drop(state, "layers.1."), r"missing.*model\.layers\.1\..* and \d+ more"),
    "a layer too many": (
        lambda state: {**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)},
        r"no place for: model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "a value head": (lambda state: {**state, "v_head.summary.weight": torch.zeros(1)}, "no place for: v_head"),
    "another shape": (
        lambda state: {**state, "model.norm.weight": torch.zeros(7)},
        r"model\.norm\.weight has shape \[7\] in the checkpoint and \[32\] in the model",
    ),
    "an embedding of another size": (
        lambda state: {**state, EMBEDDING: torch.zeros(64, 32)},
        r"embed_tokens\.weight has shape \[64, 32\] in the checkpoint and \[96, 32\]",
    ),
}


def drop(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize("kind", NOT_THE_MODELS)
def test_tensors_that_are_not_the_models_are_refused_by_name(kind, change, tmp_path):
    function, message = NOT_THE_MODELS[kind]
    folder = change(function)
    with pytest.raises(UserError, match=message):
        load(folder)
    with pytest.raises(UserError, match=message):
        convert_like_zero3(folder, tmp_path)


EXTRAS = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 256, 256),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    },
    "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)},
}


@pytest.mark.parametrize("family", EXTRAS)
def test_buffers_that_published_checkpoints_carry_are_no_reason_to_refuse(family, change):
    folder = change(lambda state: {**state, **EXTRAS[family]}, family)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(load(folder)(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_the_body_alone_loads_where_the_head_is_the_embedding(change):
    folder = change(lambda state: {name.removeprefix("model."): value for name, value in state.items()}, "llama")
    expected = save_tiny_model("llama", folder.parent / "again")
    with torch.no_grad():
        torch.testing.assert_close(load(folder)(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "is_tied"), [(1.0, True), (2.0, False)])
def test_the_configuration_says_truly_whether_the_head_is_the_embedding(scale, is_tied, change, tmp_path):
    """Saved with a head of its own though tie_word_embeddings is true: tied only where both are equal."""
    folder = change(lambda state: {**state, HEAD: state[EMBEDDING] * scale}, "llama")
    model = load(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
    save_model(model, load_tokenizer(ModelConfig(path=str(folder))), tmp_path / "out", "unused", is_main=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) is not is_tied
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["no shard", "cut", "cut bin"])
def test_files_that_are_absent_or_damaged_are_one_message(damage, tmp_path):
    model = save_tiny_model("llama", tmp_path / "model")
    folder = tmp_path / "model"
    if damage == "no shard":
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
    elif damage == "cut":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        load(folder)
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        convert_like_zero3(folder, tmp_path)


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "{folder}/secret.safetensors", "a/../../secret.safetensors"]
)
def test_an_index_names_no_file_outside_of_its_folder(outside, tmp_path):
    """It came with a download; the file that it names would be read, and trained on."""
    folder, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    save_tiny_model("llama", folder)
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(secret)
    weight_map = dict.fromkeys(names, outside.format(folder=tmp_path))
    for kind in (WEIGHT_INDEX, "pytorch_model.bin.index.json"):
        index = folder / kind
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        refused = rf"^{re.escape(str(index))}: names .*secret.* no file of the model's folder"
        for read in (load, lambda folder: convert_like_zero3(folder, tmp_path)):
            with pytest.raises(UserError, match=refused):
                read(folder)
        if kind == WEIGHT_INDEX:
            with pytest.raises(UserError, match=refused):
                zero3._read_index(str(folder), None)
        index.unlink()


def test_a_damaged_index_is_one_message(tmp_path):
    save_tiny_model("llama", tmp_path)
    for content in ("", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / WEIGHT_INDEX).write_text(content)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: (damaged|names)"):
            zero3._read_index(str(tmp_path), None)

"""Every file of a model folder, damaged in every way: one message that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssgen_ds.errors import UserError
from ssgen_ds.inference.model_source import load_model_source, resolve_model_source
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.modeling.model_folder import read_notes
from ssgen_ds.modeling.model_path import split_adapter
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.damage import FILES
from tests.support.tiny_models import save_tiny_model

Open = Callable[[Path], object]


def open_model(folder: Path) -> object:
    """What every command does with a folder."""
    model_source = resolve_model_source(str(folder))
    vocabulary, model = load_tokenizer(model_source.model).get_vocab(), load_model_source(model_source, "cpu")
    return vocabulary, model.config.to_dict() | {"_name_or_path": ""}, model_source.notes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    save_tiny_model("llama", folder)
    (folder / "ssgen.json").write_text('{"format": 1, "system": "be brief"}')
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "ssgen.json").write_text('{"format": 1, "system": "be brief"}')
    return folder


def open_adapter(folder: Path) -> object:
    base, found = split_adapter(str(folder))
    assert found == str(folder)
    return base, read_notes(found)


def told(use: Open, folder: Path) -> object:
    """What is read, or the message."""
    try:
        return use(folder)
    except UserError as problem:
        return str(problem)


# Not told from a whole file: a configuration and a tokenizer of another shape are named by what they lack.
UNNAMED = {("config.json", "other-shape"), ("tokenizer_config.json", "other-shape")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", "model"), ("model.safetensors", "model"), ("tokenizer.json", "model"), ("ssgen.json", "model"),
        ("tokenizer_config.json", "model"), ("adapter_config.json", "adapter"), ("ssgen.json", "adapter"),
        ("adapter_model.safetensors", "adapter"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(request: pytest.FixtureRequest, tmp_path: Path, name: str, kind: str) -> None:
    whole: Path = request.getfixturevalue(kind)
    use: Open = open_model if kind == "model" else open_adapter
    wanted = use(whole)
    for damage, spoil in FILES.items():
        folder = tmp_path / damage
        shutil.copytree(whole, folder)
        file = folder / name
        file.write_bytes(spoil(file.read_bytes()))
        found = told(use, folder)
        if isinstance(found, str):
            assert (name in found and str(folder) in found) or (name, damage) in UNNAMED, (damage, found)
        else:  # NUL bytes behind a file of ours count as not written; an adapter may say nothing of its base
            assert (found == wanted and damage == "nul-tail") or (name, damage) == (
                "adapter_config.json",
                "other-shape",
            )


def test_a_missing_part_of_the_weights_is_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: missing; fetch or copy it again"):
        load_model(ModelConfig(path=str(folder)), AdapterConfig(), {}, device="cpu")


def test_an_error_in_code_is_not_called_damage(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While weights load anything may go wrong; only a file that is damaged is the user's to mend."""

    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("ssgen_ds.modeling.load._load_whole", fail)
    with pytest.raises(KeyError, match="a bug"):
        load_model(ModelConfig(path=str(model)), AdapterConfig(), {}, device="cpu")

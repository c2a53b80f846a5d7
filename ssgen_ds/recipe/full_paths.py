"""Paths of a recipe as they are kept in a run: in full, so that it can be used from any working directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssgen_ds.recipe.schema import DataConfig, ModelConfig, Recipe, SourceConfig


def with_full_paths(recipe: Recipe) -> Recipe:
    """The recipe with what exists named by its full path; hub ids and `package:` stay as they are."""
    return recipe.model_copy(update={"model": _model(recipe.model), "data": _data(recipe.data)})


def full_path(path: str) -> str:
    """The full path of what exists; else the text. Links are not followed: a hub's cache is made of them."""
    place = Path(path).expanduser()
    return os.path.abspath(place) if place.exists() else path


def _model(model: ModelConfig) -> ModelConfig:
    adapter = None if model.adapter_path is None else full_path(model.adapter_path)
    return model.model_copy(update={"path": full_path(model.path), "adapter_path": adapter})


def _data(data: DataConfig) -> DataConfig:
    template = None if data.chat_template is None else full_path(data.chat_template)
    sources = {"train": [_source(one) for one in data.train], "eval": [_source(one) for one in data.eval]}
    return data.model_copy(update={"chat_template": template, **sources})


def _source(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"path": full_path(source.path)})

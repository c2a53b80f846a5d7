"""Tiny inputs shared by the end-to-end tests, and runs of the real commands on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.recipe.load import dump_recipe
from tests.support.tiny_runs import make_inputs, tiny_recipe

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def write_recipe(inputs: Path) -> WriteRecipe:
    """`write_recipe(name, **overrides)` -> a recipe file of bss+rac whose run folder is `inputs/runs/name`."""

    def write(name: str, output: Path | None = None, **overrides: Any) -> Path:
        settings = {"method__name": "bss+rac", "adapter__rank": 4, **overrides}
        recipe = tiny_recipe(inputs, output or inputs / "runs" / name, **settings)
        file = inputs / f"{name}.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        return file

    return write


def weights_hash(run_dir: Path) -> str:
    """Of the exported weight files, byte for byte."""
    files = sorted((run_dir / "model").glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

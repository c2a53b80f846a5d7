"""Every shipped recipe trains the embedded model on its own data, cut down to two small steps."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from ssgen_ds.recipe.load import load_recipe
from tests.support.rank_runs import rows_of, trained
from tests.support.ranks import ranks
from tests.support.shipped_recipes import RECIPES

SMALL = {
    "data.max_prompt_tokens": 64,
    "data.max_response_tokens": 16,
    "method.rac.max_draft_tokens": 6,
    "train.epochs": "null",
    "train.max_steps": 2,
    "train.global_batch": 2,
    "train.micro_batch": 2,
    "selfgen.refresh_every": 1,
    "eval.every": "null",
    "eval.max_examples": 2,
    "checkpoint.every": "null",
}


@ranks(1)
@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_shipped_recipe_trains(world, folder: Path, name):
    path = next(path for path in RECIPES if path.stem == name)
    output = folder / "recipes" / name
    overrides = [f"{key}={value}" for key, value in SMALL.items()] + [f"output_dir={output}"]
    rows = rows_of(trained(load_recipe(path, overrides), world))
    assert (output / "report.html").is_file()
    shutil.rmtree(output)  # a checkpoint and a model: 2 GiB
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)

"""Every shipped recipe that needs no hub trains on its own data, cut down to two small steps.

One trains the embedded model; the others a small one of its family with its tokenizer, for their data and settings.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ssgen_ds.modeling.load import load_config, load_tokenizer
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
LAYERS = {"num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96}


@pytest.fixture(scope="module")
def small_model(world, folder: Path) -> str:
    model = load_recipe("recipes/demo.yaml").model
    path = folder / "small-smollm2"
    config = load_config(model)
    config.update(LAYERS)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer(model).save_pretrained(path)
    return str(path)


@ranks(1)
@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_shipped_recipe_trains(world, folder: Path, small_model: str, name: str):
    path = next(path for path in RECIPES if path.stem == name)
    output = folder / "recipes" / name
    settings = {**SMALL, "output_dir": output} | ({} if name == "demo" else {"model.path": small_model})
    rows = rows_of(trained(load_recipe(path, [f"{key}={value}" for key, value in settings.items()]), world))
    assert (output / "report.html").is_file()
    shutil.rmtree(output)  # a checkpoint and a model
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)

"""Every shipped recipe trains the embedded model on its own data, cut down to two small steps."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ssgen_ds.config import load_recipe
from ssgen_ds.distributed import World
from ssgen_ds.train import fit_and_export

EVERY = sorted(Path("recipes").rglob("*.yaml"))
# The others need a hub and GPUs: they are planned in tests/unit/plan.
RECIPES = [path for path in EVERY if load_recipe(path).model.path.startswith("package:")]
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


def recipe_case(path: Path) -> Any:
    def case(world: World, folder: Path) -> bool:
        output = folder / "recipes" / path.stem
        overrides = [f"{key}={value}" for key, value in SMALL.items()] + [f"output_dir={output}"]
        fit_and_export(load_recipe(path, overrides), world)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert (output / "report.html").is_file()
        shutil.rmtree(output)  # a checkpoint and a model: 2 GiB
        return len(rows) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)

    return case


CASES = {path.stem: recipe_case(path) for path in RECIPES}

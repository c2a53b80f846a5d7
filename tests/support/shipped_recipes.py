"""The recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

from ssgen_ds.recipe.load import load_recipe

EVERY = sorted(Path("recipes").rglob("*.yaml"))
# The others need a hub and GPUs: they are planned in tests/unit/plan.
RECIPES = [path for path in EVERY if load_recipe(path).model.path.startswith("package:")]

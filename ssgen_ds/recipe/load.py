"""Reading a recipe: a YAML file, dotted `key=value` overrides, and every problem at once.

recipe = load_recipe("recipes/demo.yaml", ["train.lr=1e-5"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.checks import cross_field_problems
from ssgen_ds.recipe.overrides import apply_override, strict_yaml
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.recipe.user_paths import expanded_path
from ssgen_ds.recipe.validation import validate

# Stand-ins for required keys that are missing or faulty, so that the cross-field checks still run on the rest.
REQUIRED: dict[str, Any] = {"model": {"path": "-"}, "data": {"train": ["-"]}, "train": {}, "output_dir": "-"}

# Keys, and whole sections (with a point), that may differ on resume: they change where or how often something is
# written, what is evaluated, how the arithmetic is cut up, or how long it goes on, not what a step is trained on.
FREE_ON_RESUME = (
    "output_dir", "resume", "log.", "checkpoint.", "recovery.", "eval.", "data.eval", "data.packing",
    "train.epochs", "train.max_steps", "train.micro_batch", "train.micro_batch_tokens", "train.max_skipped_steps",
    "deepspeed", "model.gradient_checkpointing", "selfgen.batch", "selfgen.strategy", "selfgen.block",
    "selfgen.cuda_graph", "selfgen.reuse",
)  # fmt: skip


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply dotted `key=value` overrides, validate. Raises UserError with every problem at once."""
    file = Path(expanded_path(path, "recipe"))
    if not file.is_file():
        raise UserError(f"recipe {path}: no such file")
    try:
        raw = strict_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: expected sections such as model:, data:, train:, got {type(raw).__name__}")
    for override in overrides or []:
        apply_override(raw, override, Recipe)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a nested dictionary. Field errors and cross-field errors are reported together."""
    recipe, problems = validate(Recipe, raw, REQUIRED)
    if recipe is not None:
        problems += cross_field_problems(recipe)
    if problems:
        raise UserError.from_list(f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    assert recipe is not None
    return recipe


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with dotted `key=value` overrides. Raises UserError."""
    raw = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(raw, override, Recipe)
    return parse_recipe(raw)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys that differ and change what is trained, as `key: old -> new`."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not may_change(key)
    ]


def may_change(key: str) -> bool:
    """Whether a run may go on although this dotted key differs."""
    return key in FREE_ON_RESUME or key.startswith(tuple(name for name in FREE_ON_RESUME if name.endswith(".")))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, child in value.items() for k, v in _flatten(child, f"{prefix}.{key}".lstrip(".")).items()}

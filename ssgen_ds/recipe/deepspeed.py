"""A DeepSpeed file plus the recipe -> the dictionary given to `deepspeed.initialize`. Pure; imports no torch.

"auto" values are filled from the recipe; a value that contradicts the recipe is refused by name. Clipping, batch sizes
and precision are always written: DeepSpeed's silent defaults (it clips at 1.0 when told nothing) are never in force.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import Recipe

# The recipe owns these; a template must not bring its own.
_OWNED = {
    "optimizer": "train.optimizer, train.lr, train.weight_decay",
    "scheduler": "train.schedule, train.warmup",
    "fp16": "model.dtype (float32 or bfloat16)",
    "amp": "model.dtype (float32 or bfloat16)",
}
_SUM_DTYPES = ("bf16", "fp32")  # of gradients over micro batches, in DeepSpeed's words


_PACKAGE = Path(__file__).parents[1]
DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's own
_LONE_BUCKET = 8_000_000


def find_shipped(name: str) -> Path | None:
    """A file by path: in the working directory first, then beside the package (checkout), then inside it."""
    return next((root / name for root in (Path(), _PACKAGE.parent, _PACKAGE) if (root / name).is_file()), None)


def find_template(name: str) -> Path:
    """A DeepSpeed file by path, as `find_shipped` finds it. Raises UserError naming those there are."""
    file = find_shipped(name)
    if file is not None:
        return file
    available = sorted(str(path) for path in (_PACKAGE.parent / "ds_configs").glob("*.json"))
    raise UserError(f"deepspeed: no such file: {name}; shipped with ssgen: {', '.join(available) or 'none found'}")


def build_ds_config(recipe: Recipe, world_size: int, dtype: str) -> dict[str, Any]:
    """The full DeepSpeed dictionary for `dtype` float32 or bfloat16 on `world_size` ranks."""
    template = _read_template(recipe.deepspeed)
    config, problems = merge(template, recipe_values(recipe, world_size, dtype))
    problems += [f"{key}: remove it, the recipe decides: {owner}" for key, owner in _OWNED.items() if key in template]
    stage = zero_stage(config)
    problems += _sum_problems(config, dtype)
    if offloads_optimizer(config) and recipe.train.optimizer != "adamw":
        problems.append(
            "zero_optimization.offload_optimizer: runs on the host, where "
            f"train.optimizer={recipe.train.optimizer} has no kernels; set train.optimizer=adamw"
        )
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}")
    if problems:
        raise UserError.from_list(f"deepspeed: {recipe.deepspeed} contradicts the recipe", problems)
    return config


def certain_problems(recipe: Recipe, world_size: int) -> list[str]:
    """What `build_ds_config` refuses on every device: where model.dtype is auto, the device decides the dtype."""
    dtypes = ("float32", "bfloat16") if recipe.model.dtype == "auto" else (recipe.model.dtype,)
    refusals = []
    for dtype in dtypes:
        try:
            build_ds_config(recipe, world_size, dtype)
        except UserError as error:
            refusals.append(str(error))
    return [] if len(refusals) < len(dtypes) else [min(refusals, key=len)]


def inference_config(name: str | None, world_size: int) -> dict[str, Any]:
    """What loading needs of a DeepSpeed file to partition a model that is not trained; {} where each rank holds it."""
    zero = {} if name is None else _read_template(name).get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return {}
    offload = {key: value for key, value in zero.items() if key == "offload_param"}
    return {"train_batch_size": world_size, "zero_optimization": {"stage": 3, **offload}}


def _read_template(name: str) -> dict[str, Any]:
    try:
        return json.loads(find_template(name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed: {name} is not valid JSON: {error}") from None


def recipe_values(recipe: Recipe, world_size: int, dtype: str) -> dict[str, Any]:
    """What the recipe says in DeepSpeed's words. Windows may be cut differently; see `training/step.py`."""
    micro = 1 if recipe.train.micro_batch == "auto" else int(recipe.train.micro_batch)  # `data/window.py` cuts
    accumulation = math.ceil(recipe.train.global_batch / (micro * world_size))
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": recipe.train.clip,
        # A float32 adapter is trained as it is: DeepSpeed would cast it, and keep a second float32 copy.
        "bf16": {"enabled": dtype == "bfloat16" and recipe.adapter.dtype == "auto"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


def merge(template: dict[str, Any], values: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Template with the recipe's values filled in where it says "auto" or nothing; what contradicts them, by name."""
    merged, problems = dict(template), []
    for key, value in values.items():
        current, name = template.get(key, "auto"), f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(current, dict):
            merged[key], deeper = merge(current, value, f"{name}.")
            problems += deeper
        elif current == "auto":
            merged[key] = value
        elif current != value:
            problems.append(f'{name}: {current!r}, but the recipe gives {value!r}; write "auto" or change the recipe')
    problems += [
        f'{prefix}{key}: "auto", but nothing in the recipe decides it; write a value'
        for key, value in merged.items()
        if value == "auto"
    ]
    return merged, problems


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed dictionary; absent means 0."""
    return config.get("zero_optimization", {}).get("stage", 0)


def sums_in_float32(config: dict[str, Any]) -> bool:
    """Whether gradients are summed over micro batches in float32, whatever the model computes in."""
    return (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32"


def _sum_problems(config: dict[str, Any], dtype: str) -> list[str]:
    """What is wrong with `data_types`, of which the dtype of the gradients' sums is all that a file may set."""
    types = config.get("data_types") or {}
    name, given = "data_types.grad_accum_dtype", types.get("grad_accum_dtype")
    problems = [f"data_types.{key}: remove it, only grad_accum_dtype may be set" for key in types if key != name[11:]]
    if given not in (None, *_SUM_DTYPES):
        problems.append(f"{name}: must be one of {', '.join(_SUM_DTYPES)}, got {given!r}")
    elif given == "fp32" and dtype == "bfloat16" and zero_stage(config) < 2:
        problems.append(f"{name}: DeepSpeed sums in float32 at ZeRO-2 and 3 only; set zero_optimization.stage=2")
    elif given == "bf16" and dtype == "float32":
        problems.append(f"{name}: the model computes in float32; remove it")
    return problems


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live in host memory, which needs DeepSpeed's own CPU Adam."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def offloads_parameters(config: dict[str, Any]) -> bool:
    """Whether weights live in host memory, and come to the GPU layer by layer."""
    return (config.get("zero_optimization", {}).get("offload_param") or {}).get("device", "none") != "none"


def fitting_bucket(config: dict[str, Any], trained: int, ranks: int) -> int:
    """Elements of `reduce_bucket_size`: at most the trained parameters, and few where one rank has nobody to send to.

    ZeRO allocates the bucket in full, ZeRO-2 with overlap_comm twice: 200 million elements beside an adapter of one.
    """
    bucket = int(config.get("zero_optimization", {}).get("reduce_bucket_size", DEFAULT_BUCKET))
    return min(bucket, trained, _LONE_BUCKET if ranks == 1 else bucket)


def with_fitting_bucket(config: dict[str, Any], trained: int, ranks: int) -> dict[str, Any]:
    """The dictionary with that bucket; as it is without ZeRO."""
    if zero_stage(config) == 0:
        return config
    zero = {**config["zero_optimization"], "reduce_bucket_size": fitting_bucket(config, trained, ranks)}
    return {**config, "zero_optimization": zero}

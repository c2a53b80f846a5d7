"""`ssgen plan`: does a recipe fit, what would make it fit, and how long it takes, before any weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.families import check_trainable
from ssgen_ds.plan.memory import MemoryPlan, Setting, as_json, plan_memory
from ssgen_ds.plan.sizes import Sizes, find_config, measure
from ssgen_ds.plan.timing import Rate, Work, measured_rate, published_rate, seconds
from ssgen_ds.recipe.deepspeed import (
    DEFAULT_BUCKET,
    build_ds_config,
    fitting_bucket,
    offloads_optimizer,
    offloads_parameters,
    sums_in_float32,
    zero_stage,
)
from ssgen_ds.recipe.load import load_recipe, with_overrides
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.sampler.limits import MOST_ROWS

_CONTEXT = 1.2 * GIB  # what a CUDA context takes: the driver, kernels, NCCL's buffers
_FRAGMENTS = 1.05  # reserved by torch's allocator over what it has handed out
_DEFAULT_PERSISTENCE, _DEFAULT_LIVE = 100_000, 1_000_000_000  # DeepSpeed's own


@dataclass(frozen=True)
class Hardware:
    """The machines to plan for."""

    gpus: int  # GPUs in a node; 0: the CPU, with one rank in a node
    nodes: int
    memory: float  # bytes of one device
    name: str
    is_here: bool
    host_memory: float = float("inf")  # bytes of a node; inf when not known

    @property
    def ranks(self) -> int:
        return max(1, self.gpus) * self.nodes


def parse_size(text: str) -> float:
    """`24GiB`, `80GB`, `16g` (GiB) -> bytes. Raises UserError."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?b?)\s*", text.lower())
    if not match:
        raise UserError(f"{text!r} is no size of memory such as 24GiB or 80GB")
    number, unit, suffix = match.groups()
    return float(number) * (1000.0 if suffix == "b" else 1024.0) ** " kmgt".index(unit or " ")


def find_hardware(gpus: int | None, nodes: int, memory: str, host_memory: str = "") -> Hardware:
    """The hardware that was asked for; this machine's values where nothing was said."""
    import psutil

    here = torch.cuda.is_available()
    if gpus is None:
        gpus = torch.cuda.device_count() if here or not memory else 1
    if memory:
        size, name = parse_size(memory), "as given"
    elif here:
        properties = torch.cuda.get_device_properties(0)
        size, name = float(properties.total_memory), properties.name
    elif gpus:
        raise UserError("--gpu-memory: there is no GPU here to ask; say how much one has, for instance 24GiB")
    else:
        size, name = float(psutil.virtual_memory().available), "host memory"
    is_here = (here and gpus > 0) or (not here and gpus == 0)
    available = float(psutil.virtual_memory().available) if is_here else float("inf")
    return Hardware(gpus, nodes, size, name, is_here, parse_size(host_memory) if host_memory else available)


@lru_cache
def _sizes(raw: str, dtype: str, persistence: int) -> Sizes:
    recipe = Recipe.model_validate_json(raw)
    config, _ = find_config(recipe)
    return measure(config, recipe.adapter, getattr(torch, dtype), persistence, recipe.data.packing)


def sizes_of(recipe: Recipe, dtype: str, persistence: int) -> Sizes:
    """Measured once for each model, adapter and dtype."""
    key = Recipe.model_validate(
        {
            "model": {**recipe.model.model_dump(), "gradient_checkpointing": False},
            "adapter": recipe.adapter.model_dump(),
            "data": {"train": ["-"], "packing": recipe.data.packing},
            "train": {"max_steps": 1},
            "output_dir": "-",
        }
    ).model_dump_json()
    return _sizes(key, dtype, persistence)


def longest_rows(recipe: Recipe) -> tuple[int, int]:
    """(tokens of the longest sequence trained on, tokens of the longest row while generating), by the recipe.

    Without a tokenizer a cue counts a token for every three characters, and eight for its turn.
    """
    data, rac = recipe.data, recipe.method.rac
    longest = data.max_prompt_tokens + data.max_response_tokens
    row = longest
    if recipe.method.uses_rac:
        draft = data.max_prompt_tokens + rac.max_draft_tokens
        corrected = draft + len(rac.correction_cue) // 3 + 8 + data.max_response_tokens
        row = max(row, draft)
        if rac.target == "rewrite":
            row = max(row, corrected + len(rac.rewrite_cue) // 3 + data.max_response_tokens)
        longest = max(longest, corrected)
    return longest, row


def setting_of(recipe: Recipe, hardware: Hardware, dtype: str) -> tuple[Setting, dict[str, Any]]:
    """The memory model's input, and the DeepSpeed dictionary it was taken from."""
    config = build_ds_config(recipe, hardware.ranks, dtype)
    zero = config.get("zero_optimization", {})
    longest, row = longest_rows(recipe)
    share = -(-recipe.train.global_batch // hardware.ranks)
    micro = 1 if recipe.train.micro_batch == "auto" else min(int(recipe.train.micro_batch), share)
    tokens = micro * longest
    if recipe.train.micro_batch_tokens is not None:
        tokens = max(longest, min(tokens, recipe.train.micro_batch_tokens))
    per_round = share * recipe.selfgen.refresh_every
    rows = MOST_ROWS if recipe.selfgen.batch == "auto" else int(recipe.selfgen.batch)
    element = getattr(torch, dtype).itemsize
    is_cuda, has_adapter = hardware.gpus > 0, recipe.adapter.kind != "none"
    adapter_element = 4 if recipe.adapter.dtype == "float32" else element
    return Setting(
        stage=zero_stage(config),
        ranks=hardware.ranks,
        element=element,
        is_mixed=config["bf16"]["enabled"],
        adapter_element=adapter_element,
        gradient_element=4 if sums_in_float32(config) else adapter_element if has_adapter else element,
        nf4=recipe.quantization.kind == "nf4",
        double=recipe.quantization.double,
        moments=8.0 if recipe.train.optimizer == "adamw" else 2.0 + 8.0 / 256,
        offload_optimizer=offloads_optimizer(config),
        offload_param=offloads_parameters(config),
        checkpointing=recipe.model.gradient_checkpointing,
        micro_tokens=tokens,
        accumulates=share > micro or recipe.train.micro_batch_tokens is not None,
        labels=tokens * recipe.data.max_response_tokens // longest,
        rows=min(rows, per_round),
        row_tokens=row,
        strategy=recipe.selfgen.strategy,
        generates=recipe.generates,
        reduce_bucket=fitting_bucket(config, DEFAULT_BUCKET, hardware.ranks),
        live=int(zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)),
        memory=hardware.memory / (_FRAGMENTS if is_cuda else 1.0),
        overhead=_CONTEXT if is_cuda else 0.0,
        is_cpu=not is_cuda,
        recorded_tokens=share * longest if _may_record(recipe, zero_stage(config)) else 0,
    ), config


def _may_record(recipe: Recipe, stage: int) -> bool:
    """Whether `selfgen.reuse` may record a step, as far as the recipe says; see `training/one_forward.py`."""
    is_bss = recipe.method.uses_bss and not recipe.method.uses_rac
    is_fresh = recipe.selfgen.refresh_every == 1 and recipe.model.gradient_checkpointing
    return is_bss and is_fresh and recipe.data.packing and stage < 3 and recipe.selfgen.reuse != "off"


def plan_recipe(recipe: Recipe, hardware: Hardware) -> tuple[MemoryPlan, Sizes, Setting]:
    """Raises UserError for what is wrong with the recipe or its DeepSpeed file."""
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else ("bfloat16" if hardware.gpus else "float32")
    setting, config = setting_of(recipe, hardware, dtype)
    persistence = config.get("zero_optimization", {}).get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENCE)
    sizes = sizes_of(recipe, dtype, int(persistence))
    return plan_memory(sizes, setting), sizes, setting


def fits(plan: MemoryPlan, setting: Setting, hardware: Hardware) -> bool:
    """Whether the plan fits on every device, and offloaded states in the memory of a node."""
    return plan.highest <= setting.memory and plan.host_bytes * max(1, hardware.gpus) <= hardware.host_memory


def offload_problems(recipe: Recipe, dtype: str, ranks: int, free: float) -> list[str]:
    """Whether a host holds what is offloaded to it, told before any weight is read.

    Args:
        free: bytes of the host that are left for each of its ranks.
    """
    setting, config = setting_of(recipe, Hardware(0, ranks, free, "", False), dtype)
    persistence = config["zero_optimization"].get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENCE)
    need = plan_memory(sizes_of(recipe, dtype, int(persistence)), setting).host_bytes
    if need <= free:
        return []
    return [
        f"deepspeed: {recipe.deepspeed} keeps {need / GIB:.3g} GiB of each rank in its host's memory, of which "
        f"{free / GIB:.3g} GiB a rank are free; use more nodes, adapter.kind=lora, or deepspeed=ds_configs/zero3.json"
    ]


# In the order of what they cost: the first ones change nothing but speed, the last ones what is trained.
CHANGES = (
    ("train.micro_batch=1",),
    ("model.gradient_checkpointing=true",),
    ("selfgen.strategy=sharded",),
    ("deepspeed=ds_configs/zero1.json",),
    ("deepspeed=ds_configs/zero2.json",),
    ("deepspeed=ds_configs/zero3.json",),
    ("train.optimizer=paged_adamw_8bit",),
    ("deepspeed=ds_configs/zero3_offload.json",),
    ("adapter.kind=lora",),
    ("adapter.kind=lora", "quantization.kind=nf4"),
)


def advise(recipe: Recipe, hardware: Hardware) -> list[str] | None:
    """The fewest and mildest `key=value` that make the recipe fit; None when none of them do."""
    for number in (1, 2, 3, 4):
        for chosen in combinations(CHANGES, number):
            changes = [change for group in chosen for change in group]
            keys = [change.partition("=")[0] for change in changes]
            if len(set(keys)) < len(keys):
                continue
            try:
                plan, _, setting = plan_recipe(with_overrides(recipe, changes), hardware)
            except UserError:
                continue
            if fits(plan, setting, hardware):
                return changes
    return None


def timing(
    recipe: Recipe, sizes: Sizes, setting: Setting, plan: MemoryPlan, hardware: Hardware
) -> dict[str, Any] | None:
    """Seconds of a step and of a round's generation, with the source of the rate; None when no rate is known."""
    rate: Rate | None
    if hardware.is_here:
        device = torch.device("cuda" if hardware.gpus else "cpu")
        rate = measured_rate(device, torch.bfloat16 if setting.element == 2 else torch.float32)
    else:
        rate = published_rate(hardware.name)
    if rate is None:
        return None
    method, data = recipe.method, recipe.data
    longest, _ = longest_rows(recipe)
    per_example = 2 if method.uses_rac else 1
    work = Work(
        tokens=recipe.train.global_batch * longest * per_example,
        length=longest,
        response=data.max_response_tokens,
        sequences=recipe.train.global_batch,
        mix_rate=method.bss.mix_rate if method.uses_bss else 0.0,
        draft=method.rac.max_draft_tokens if method.uses_rac else 0,
        steps_per_round=recipe.selfgen.refresh_every,
        rows=max(1, plan.cache_rows),
        ranks=hardware.ranks,
        checkpointing=setting.checkpointing,
        element=setting.element,
    )
    return {**seconds(sizes, work, rate), "rate": rate.source}


def print_plan(file: Path, overrides: list[str], hardware: Hardware, card: str, as_json_only: bool) -> bool:
    """Print the plan; whether the recipe fits."""
    recipe = load_recipe(file, overrides)
    config, where = find_config(recipe)
    check_trainable(config, recipe)
    if card:
        hardware = replace(hardware, name=card, is_here=False)
    plan, sizes, setting = plan_recipe(recipe, hardware)
    ok = fits(plan, setting, hardware)
    changes = None if ok else advise(recipe, hardware)
    times = timing(recipe, sizes, setting, plan, hardware)
    if as_json_only:
        body = {**as_json(plan), "fits": ok, "memory": setting.memory, "changes": changes, "seconds": times}
        print(json.dumps({"model": where, "parameters": sizes.parameters, "trained": sizes.trained, **body}))
    else:
        from ssgen_ds.plan.table import show

        show(plan, sizes, setting, hardware, where, ok, changes, times)
    return ok

"""Whether the ranks' devices can do what the recipe asks, told for all of them before any weight is read."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.plan.run import Hardware, advise, plan_recipe
from ssgen_ds.recipe.schema import Recipe

_SURE = 0.85  # of what is planned: it may be that much too high


@dataclass(frozen=True)
class DeviceFacts:
    """What a rank knows of its device; of a CPU only that it is one."""

    kind: str
    name: str = ""  # of the GPU and its host
    total: float = 0.0  # bytes
    free: float = 0.0
    has_bfloat16: bool = True


def device_facts(device: torch.device) -> DeviceFacts:
    """Of this rank."""
    if device.type != "cuda":
        return DeviceFacts(device.type)
    free, total = torch.cuda.mem_get_info(device)
    name = f"{torch.cuda.get_device_name(device)} (GPU {device.index} of {socket.gethostname()})"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return DeviceFacts(device.type, name, float(total), float(free), has_bfloat16)


def device_problems(recipe: Recipe, dtype: str, ranks: list[DeviceFacts]) -> list[str]:
    """One sentence a problem, with the field and the fix.

    Args:
        dtype: in which the model computes.
        ranks: the facts of every rank.
    """
    on_gpu = [facts for facts in ranks if facts.kind == "cuda"]
    problems = []
    if recipe.model.attention == "flash_attention_2" and (len(on_gpu) < len(ranks) or dtype != "bfloat16"):
        problems.append(
            "model.attention=flash_attention_2: its kernels are a GPU's, in bfloat16; set model.attention=sdpa"
        )
    if dtype == "bfloat16" and (old := sorted({facts.name for facts in on_gpu if not facts.has_bfloat16})):
        problems.append(f"model.dtype: {', '.join(old)} cannot compute in bfloat16; set model.dtype=float32")
    return problems + _memory_problems(recipe, on_gpu, len(ranks))


def _memory_problems(recipe: Recipe, ranks: list[DeviceFacts], size: int) -> list[str]:
    """Of the GPU with the least free memory: what training holds at the least, whatever the micro batch."""
    if not ranks:
        return []
    poorest = min(ranks, key=lambda facts: facts.free)
    hardware = Hardware(size, 1, poorest.total, "", False)
    plan, _, _ = plan_recipe(recipe, hardware)
    held = ("weights", "masters", "moments", "overhead")
    need = max(plan.phases["load"]["weights"], sum(plan.phases["optimizer"][part] for part in held))
    if _SURE * need <= poorest.free:
        return []
    told = f"weights and optimizer take {need / GIB:.3g} GiB on each GPU, {poorest.name} has {poorest.total / GIB:.3g}"
    if _SURE * need <= poorest.total:
        busy = (poorest.total - poorest.free) / GIB
        return [f"model.path: {told}, of which others use {busy:.3g}; end what `nvidia-smi` shows there"]
    changes = advise(recipe, hardware)
    fix = " ".join(changes) if changes else "a smaller model, or more GPUs with deepspeed=ds_configs/zero3.json"
    return [f"model.path: {told}; {'set ' if changes else 'take '}{fix}"]

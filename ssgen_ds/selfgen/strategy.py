"""Where parameters are while the model generates, and how many sequences fit: decided from measured free memory.

local      ZeRO 0-2: every rank has whole parameters.
dequantized  the same, of a quantised base: its weights are dequantised once for a whole round, not at every call.
sharded    ZeRO-3: a layer is gathered, used and let go at every call. Slow calls, little memory.
gathered   ZeRO-3: all parameters are gathered once for a whole round. Fast calls, the whole model on every rank.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from ssgen_ds.config import Recipe, SelfgenConfig
from ssgen_ds.distributed import World
from ssgen_ds.modeling.gather import full_shape, is_partitioned
from ssgen_ds.modeling.shards import Shards
from ssgen_ds.selfgen.engine_sampler import DEQUANTIZED, GATHERED, LOCAL, SHARDED, BatchLimit, EngineSampler

GIB = 2.0**30
USABLE = 0.8  # share of the free memory that gathered parameters may take: the rest is for activations
CACHE_SHARE = 0.25  # share of what is then still free that keys and values may take
MOST_ROWS = 64
MOST_ROWS_CPU = 16  # a CPU gains nothing from more where calls are cheap


def build_sampler(engine: Any, recipe: Recipe, world: World, say: Callable[[str], None]) -> EngineSampler:
    """The sampler of a training run, with its strategy and batches; says on rank 0 what was chosen and why."""
    module = engine.module
    shards = Shards(module, engine.optimizer.parameter_offload) if _has_partitions(module) else None
    reserved = optimizer_bytes_to_come(engine, world)
    sampler, reason = _choose(module, shards, recipe.selfgen, recipe.quantization.kind != "none", reserved, world)
    if world.is_main and recipe.generates:
        say(f"self-generation: {sampler.strategy}: {reason}; up to {sampler.limit.rows} sequences at once on a rank")
    return sampler


def inference_sampler(
    module: torch.nn.Module, selfgen: SelfgenConfig, is_quantized: bool, world: World
) -> EngineSampler:
    """The sampler of a model that is not trained, partitioned or whole."""
    shards = Shards(module, None) if _has_partitions(module) else None
    sampler, _ = _choose(module, shards, selfgen, is_quantized, 0.0, world)
    return sampler


def _has_partitions(module: torch.nn.Module) -> bool:
    return any(map(is_partitioned, module.parameters()))


def _choose(
    module: torch.nn.Module,
    shards: Shards | None,
    selfgen: SelfgenConfig,
    is_quantized: bool,
    reserved: float,
    world: World,
) -> tuple[EngineSampler, str]:
    """A sampler, and the reason for its strategy. `reserved`: free bytes that something else will take."""
    free = free_bytes(world) - reserved
    whole = quantized_base_bytes(module) if is_quantized and shards is None else 0
    strategy, reason = choose_strategy(selfgen.strategy, shards, free, world, whole)
    free -= {GATHERED: shards.total_bytes if shards else 0, DEQUANTIZED: whole}.get(strategy, 0)
    return EngineSampler(module, world, batch_limit(selfgen, module, strategy, free, world), strategy, shards), reason


def quantized_base_bytes(module: torch.nn.Module) -> int:
    """What the weights of a quantised base take when they are dequantised."""
    from ssgen_ds.modeling.nf4 import dequantized_bytes

    return dequantized_bytes(module)


def choose_strategy(
    setting: str, shards: Shards | None, free: float, world: World, dequantized: int = 0
) -> tuple[str, str]:
    """(strategy, its reason). `free` bytes are those of this rank; the rank with the least decides for all.

    `dequantized`: bytes of a quantised base's weights outside ZeRO-3; there `gathered` means to hold them dequantised.
    """
    if shards is None and not dequantized:
        return LOCAL, "parameters are whole on every rank"
    least = -world.max(-free)
    if shards is None:
        need = f"dequantised weights take {dequantized / GIB:.2f} GiB, {max(least, 0) / GIB:.2f} GiB are free"
        if setting == "auto":
            return (DEQUANTIZED if dequantized <= USABLE * least else LOCAL), need
        return (DEQUANTIZED if setting == "gathered" else LOCAL), f"as the recipe says ({need})"
    more = shards.total_bytes + shards.largest_unit_bytes  # the shard stays, beside its copy in the whole
    need = f"whole parameters take {more / GIB:.2f} GiB more, {max(least, 0) / GIB:.2f} GiB are free"
    if setting != "auto":
        return setting, f"as the recipe says ({need})"
    if more <= USABLE * least:
        return GATHERED, need
    return SHARDED, need


def batch_limit(
    selfgen: SelfgenConfig, module: torch.nn.Module, strategy: str, free: float, world: World
) -> BatchLimit:
    """Rows and cache bytes of a batch; the same on all ranks."""
    per_token = cache_bytes_per_token(module)
    cache_bytes = -world.max(-max(0.0, free) * CACHE_SHARE)
    if selfgen.batch != "auto":
        return BatchLimit(int(selfgen.batch), float("inf"), per_token)
    cheap_calls = world.device.type == "cpu" and strategy != SHARDED
    return BatchLimit(MOST_ROWS_CPU if cheap_calls else MOST_ROWS, cache_bytes, per_token)


def cache_bytes_per_token(module: torch.nn.Module) -> int:
    """Keys and values of one token over all layers, in the model's dtype."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # family traits
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * module.dtype.itemsize


def free_bytes(world: World) -> float:
    """What this rank may still allocate: of its GPU, or its part of the host's memory and control group."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        reusable = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return float(free + reusable)
    return host_bytes(world)


def host_bytes(world: World) -> float:
    """This rank's part of what is free of its host's memory and control group. All ranks call it."""
    hosts = world.gather(socket.gethostname())
    available = min(float(psutil.virtual_memory().available), _control_group_headroom())
    return available / hosts.count(socket.gethostname())


def _control_group_headroom(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes below the lowest limit of this process's version 2 control groups, as containers and SLURM set them.

    Pages of files that were read count as used, but the system takes them back when memory is asked for.
    """
    headroom = float("inf")
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return headroom
    group = root / line.removeprefix("0::").strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        try:
            most = (folder / "memory.max").read_text().strip()
            used = float((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root has none, and a container may hide what is above it
        if most != "max":
            headroom = min(headroom, float(most) - used + float(statistics["file"]))
    return headroom


def optimizer_bytes_to_come(engine: Any, world: World) -> float:
    """AdamW allocates its two moments at the first step, and ZeRO its gradients at the first backward: float32 each."""
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    return 3 * 4.0 * sum(full_shape(p).numel() for p in trainable) / world.size

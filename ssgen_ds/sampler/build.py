"""The sampler of a model: its strategy, and how many sequences it has in work, by the free memory that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ssgen_ds.distributed.host_memory import GIB, free_bytes
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.gather import full_shape, is_partitioned
from ssgen_ds.modeling.shards import Shards
from ssgen_ds.recipe.schema import Recipe, SelfgenConfig
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.strategy import Dequantized, Gathered, Local, Sharded, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        rows = sampler.limit.rows
        say(f"self-generation: {sampler.strategy.name}: {reason}; up to {rows} sequences at once on a rank")
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
    strategy, reason = choose_strategy(selfgen.strategy, *_strategies(module, shards, is_quantized, world), free, world)
    limit = batch_limit(selfgen, module, strategy, free - strategy.held_bytes, world)
    return EngineSampler(module, world, limit, strategy), reason


def _strategies(
    module: torch.nn.Module, shards: Shards | None, is_quantized: bool, world: World
) -> tuple[Strategy, Strategy | None]:
    """The strategy that needs no memory, and the faster one, where there is one."""
    if shards is not None:
        return Sharded(shards, world), Gathered(shards)
    if is_quantized:
        from ssgen_ds.modeling.nf4 import dequantized_bytes

        if nbytes := dequantized_bytes(module):
            return Local(), Dequantized(module, nbytes)
    return Local(), None


def choose_strategy(
    setting: str, lean: Strategy, fast: Strategy | None, free: float, world: World
) -> tuple[Strategy, str]:
    """One of the two, and the reason. `free` bytes are those of this rank; the rank with the least decides for all.

    `setting`: `selfgen.strategy`; `gathered` is the fast one, also of a quantised base outside ZeRO-3.
    """
    if fast is None:
        return lean, "parameters are whole on every rank"
    least = -world.max(-free)
    need = f"{fast.demand.format(fast.needed_bytes / GIB)}, {max(least, 0) / GIB:.2f} GiB are free"
    if setting == "auto":
        return (fast if fast.needed_bytes <= USABLE * least else lean), need
    return (fast if setting == "gathered" else lean), f"as the recipe says ({need})"


def batch_limit(
    selfgen: SelfgenConfig, module: torch.nn.Module, strategy: Strategy, free: float, world: World
) -> BatchLimit:
    """Rows and cache bytes of a batch; the same on all ranks."""
    per_token = cache_bytes_per_token(module)
    cache_bytes = -world.max(-max(0.0, free) * CACHE_SHARE)
    if selfgen.batch != "auto":
        return BatchLimit(int(selfgen.batch), float("inf"), per_token)
    cheap_calls = world.device.type == "cpu" and not strategy.is_collective
    return BatchLimit(MOST_ROWS_CPU if cheap_calls else MOST_ROWS, cache_bytes, per_token)


def cache_bytes_per_token(module: PreTrainedModel) -> int:
    """Keys and values of one token over all layers, in the model's dtype."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # family traits
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * module.dtype.itemsize


def optimizer_bytes_to_come(engine: Any, world: World) -> float:
    """AdamW allocates its two moments at the first step, and ZeRO its gradients at the first backward: float32 each.

    After a resume the moments are there: counted again, they would make the choices of the run that began other ones.
    """
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # without ZeRO it may not be wrapped
    buffers = 1 if any(inner.state.values()) else 3
    return buffers * 4.0 * sum(full_shape(p).numel() for p in trainable) / world.size

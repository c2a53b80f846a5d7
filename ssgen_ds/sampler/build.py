"""The sampler of a model: its strategy, and how many sequences it has in work, by the free memory that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ssgen_ds.distributed.host_memory import GIB, free_bytes
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.decode_step import record_cuda
from ssgen_ds.modeling.gather import full_shape, is_partitioned
from ssgen_ds.modeling.shards import Shards
from ssgen_ds.recipe.schema import Recipe, SelfgenConfig
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.limits import (
    CACHE_SHARE,
    MOST_ROWS,
    MOST_ROWS_CPU,
    USABLE,
    call_bytes_per_token,
    call_limit,
)
from ssgen_ds.sampler.strategy import Dequantized, Gathered, Local, Sharded, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    module: PreTrainedModel, selfgen: SelfgenConfig, is_quantized: bool, world: World
) -> EngineSampler:
    """The sampler of a model that is not trained, partitioned or whole."""
    shards = Shards(module, None) if _has_partitions(module) else None
    sampler, _ = _choose(module, shards, selfgen, is_quantized, 0.0, world)
    return sampler


def _has_partitions(module: torch.nn.Module) -> bool:
    return any(map(is_partitioned, module.parameters()))


def _choose(
    module: PreTrainedModel,
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
    # Under `sharded` a layer's weights come and go during a call: there is nothing that could be replayed.
    can_record = selfgen.cuda_graph and world.device.type == "cuda" and not strategy.is_collective
    return EngineSampler(module, world, limit, strategy, record_cuda if can_record else None), reason


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
    selfgen: SelfgenConfig, module: PreTrainedModel, strategy: Strategy, free: float, world: World
) -> BatchLimit:
    """Rows and cache bytes of a batch, and what a call may take; the same on all ranks."""
    least = max(0.0, -world.max(-free))
    cheap_calls = world.device.type == "cpu" and not strategy.is_collective
    rows, cache_bytes = MOST_ROWS_CPU if cheap_calls else MOST_ROWS, CACHE_SHARE * least
    if selfgen.batch != "auto":
        rows, cache_bytes = int(selfgen.batch), float("inf")
    config, element = module.config.get_text_config(), module.dtype.itemsize
    adapter = max((p.element_size() for name, p in module.named_parameters() if "lora_" in name), default=0)
    token_bytes = call_bytes_per_token(config.hidden_size, widest_output(module), adapter, element)
    call = call_limit(least, token_bytes, config.vocab_size * element, rows)
    return BatchLimit(rows, cache_bytes, cache_bytes_per_token(module), call)


def widest_output(module: PreTrainedModel) -> int:
    """Elements of the widest output of a layer for one token, the logits apart."""
    config, head = module.config.get_text_config(), module.get_output_embeddings()
    linears = [one.out_features for one in module.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    convolutions = [one.nf for one in module.modules() if isinstance(one, Conv1D)]
    # A token goes through several experts; their weights are not always Linear layers. Family traits:
    experts = getattr(config, "num_experts_per_tok", None) or 0
    expert = max(getattr(config, "moe_intermediate_size", None) or config.hidden_size, config.hidden_size)
    return max([*linears, *convolutions, experts * expert], default=4 * config.hidden_size)


def cache_bytes_per_token(module: PreTrainedModel) -> int:
    """Keys and values of one token over all layers, in the model's dtype."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # family traits
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * module.dtype.itemsize


def optimizer_bytes_to_come(engine: Any, world: World) -> float:
    """AdamW allocates its two moments at the first step, and ZeRO its gradients at the first backward: float32 each.

    A rank has its part of the moments from ZeRO-1 on, and of the gradients from ZeRO-2 on. After a resume the moments
    are there: counted again, they would make the choices of the run that began other ones.
    """
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # without ZeRO it may not be wrapped
    stage = engine.zero_optimization_stage()
    moments = 0.0 if any(inner.state.values()) else 8.0 / (world.size if stage >= 1 else 1)
    gradients = 4.0 / (world.size if stage >= 2 else 1)
    return (moments + gradients) * sum(full_shape(p).numel() for p in trainable)

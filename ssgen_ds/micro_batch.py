"""`train.micro_batch: auto`: how many of the longest sequences fit into one forward and backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ssgen_ds.config import Recipe
from ssgen_ds.distributed import World
from ssgen_ds.errors import UserError
from ssgen_ds.selfgen.strategy import GIB, free_bytes, optimizer_bytes_to_come
from ssgen_ds.step import train_step
from ssgen_ds.window import Packing, Sequence, build_window

_USABLE = 0.85  # of the free memory: allocators round up, and lengths differ


def choose_packing(engine: Any, recipe: Recipe, longest: int, world: World, say: Callable[[str], None]) -> Packing:
    """How the recipe's micro batches are cut; `auto` is measured here, once, and the same on all ranks.

    Args:
        longest: tokens of the longest sequence that training may see.

    Raises:
        UserError: not even one sequence fits.
    """
    train, is_packed = recipe.train, recipe.data.packing
    if train.micro_batch != "auto":
        return Packing(int(train.micro_batch), train.micro_batch_tokens, is_packed)
    most = -(-train.global_batch // world.size)
    free = -world.max(-free_bytes(world)) - world.max(optimizer_bytes_to_come(engine, world))
    # What one more takes is told from half a sequence and a whole one: two might not fit where one does.
    half = _bytes_of(engine, max(2, longest // 2), is_packed, world) if most > 1 else 0.0
    one = _bytes_of(engine, longest, is_packed, world)
    each = max(2 * (one - half), 1.0)
    fitting = 1 + int(max(0.0, _USABLE * free - one) // each)
    sizes = f"{one / GIB:.2f} GiB, each more {each / GIB:.2f}; {free / GIB:.2f} are free"
    need = f"a sequence of {longest} tokens takes {sizes}"
    if one > free:
        raise UserError(
            f"train.micro_batch: not even one fits: {need}; set model.gradient_checkpointing=true, lower "
            "data.max_prompt_tokens, or see `ssgen plan`"
        )
    chosen = min(most, fitting)
    if world.is_main:
        say(f"train.micro_batch auto: {chosen}: {need}")
    return Packing(chosen, train.micro_batch_tokens, is_packed)


def _bytes_of(engine: Any, length: int, is_packed: bool, world: World) -> float:
    """What a forward and backward of one sequence on each rank needs.

    The weight of their labels is NaN, so that the step is left out like any that is not finite: nothing is left.
    """
    # Every second token has a label: more than most data has, where the prompt has none.
    sequence = Sequence([3] * length, [-100 if i % 2 == 0 else 3 for i in range(length)], weight=math.nan)
    packing = Packing(1, None, is_packed)
    window = build_window([sequence] * world.size, packing, world.rank, world.size, world.device)
    measure = _cuda_bytes if world.device.type == "cuda" else _saved_bytes
    was_training = engine.training
    engine.train()
    bytes_needed = measure(lambda: train_step(engine, window, 0.0, world))
    engine.train(was_training)
    return world.max(bytes_needed)


def _cuda_bytes(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _saved_bytes(run: Callable[[], object]) -> float:
    """On a CPU, whose peak cannot be read that finely: what autograd keeps for the backward, and a third more."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values()) * 4 / 3

"""`selfgen.reuse`: the passes that sample a mixed context are the training forward, too. See `modeling/recorded.py`.

Contexts are dealt to the ranks as the step will deal them, so that a rank has recorded what it trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ssgen_ds.data.window import Packing, Window, shard_by_length
from ssgen_ds.distributed.host_memory import GIB, free_bytes
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.recorded import Recording, checkpointed_layers, has_dropout
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.sampler.build import optimizer_bytes_to_come
from ssgen_ds.sampler.limits import RECORDED_SHARE
from ssgen_ds.sampler.requests import Request

_BESIDE = 0.9  # of the free memory: a micro batch and the recording together


@dataclass
class OneForward:
    """Records a round of one step, and lends it to that step. The sampler's `Recorder`.

    Args:
        module: the model of the engine.
        packing: how the step cuts its micro batches.
    """

    module: Any
    packing: Packing
    world: World
    _micros: list[range] = field(default_factory=list, init=False)  # this rank's micro batches, as numbers of `mine`
    _recording: Recording | None = field(default=None, init=False)

    def deal(self, requests: list[Request]) -> list[list[int]]:
        """The requests of each rank: those whose contexts it will train on, micro batch by micro batch."""
        lengths = [len(request.prompt_ids) + len(request.coins) for request in requests]
        is_packed, packing = self.packing.is_packed, self.packing
        shards = shard_by_length(lengths, self.world.size, packing.sequences, packing.tokens, padded=not is_packed)
        self._micros, begin = [], 0
        for micro in shards[self.world.rank]:
            self._micros.append(range(begin, begin + len(micro)))
            begin += len(micro)
        return [[index for micro in shard for index in micro] for shard in shards]

    @contextmanager
    def recording(self, mine: list[Request]) -> Iterator[Recording]:
        """Inside, what the model computes for these requests is recorded. It is kept when all went well."""
        self._recording = None
        lengths = [len(request.prompt_ids) + len(request.coins) for request in mine]
        config = self.module.config.get_text_config()
        layers, width = checkpointed_layers(self.module), config.hidden_size
        recording = Recording(layers, lengths, width, self.module.dtype, self.world.device)
        with recording.recording():
            yield recording
        self._recording = recording

    def replays(self, window: Window) -> list[AbstractContextManager[None]]:
        """What each micro batch of the step is to be computed in; nothing where nothing was recorded."""
        recording, number = self._recording, len(window.micro_batches)
        if recording is None:
            return [nullcontext() for _ in range(number)]
        idle = number - len(self._micros)  # a rank without work for its last one repeats a sequence at weight 0
        return [recording.replayed(micro) for micro in self._micros] + [nullcontext() for _ in range(idle)]

    def forget(self) -> None:
        """After the step: the weights are others now."""
        self._recording = None


def one_forward(
    engine: Any,
    recipe: Recipe,
    packing: Packing,
    longest: int,
    taken: float,
    world: World,
    say: Callable[[str], None],
) -> OneForward | None:
    """By `selfgen.reuse`; says on rank 0 what `auto` has chosen and why.

    Args:
        longest: tokens of the longest sequence that training may see.
        taken: bytes that `train.micro_batch: auto` has measured a micro batch to take; 0 where it is not auto.

    Raises:
        UserError: `on`, and it cannot be.
    """
    if recipe.selfgen.reuse == "off" or not recipe.method.uses_bss:
        return None
    why_not = _why_not(engine, recipe, packing, longest, taken, world)
    if why_not and recipe.selfgen.reuse == "on":
        raise UserError(f"selfgen.reuse=on: {why_not}; set selfgen.reuse=auto")
    if world.is_main:
        say(f"selfgen.reuse: {why_not or 'the passes that sample are the training forward'}")
    return None if why_not else OneForward(engine.module, packing, world)


def _why_not(engine: Any, recipe: Recipe, packing: Packing, longest: int, taken: float, world: World) -> str:
    """Why contexts are computed again in the step; "" where they need not be."""
    module = engine.module
    if recipe.method.uses_rac:
        return "drafts and corrections are not recorded, so a step computes its forward"
    if recipe.selfgen.refresh_every > 1:
        return f"selfgen.refresh_every={recipe.selfgen.refresh_every}: weights change before contexts are trained on"
    if not recipe.model.gradient_checkpointing:
        return "model.gradient_checkpointing=false: a training forward keeps more than the layers' inputs"
    if not packing.is_packed:
        return "data.packing=false: the step pads its rows"
    if engine.zero_optimization_stage() == 3:
        return "ZeRO-3 follows the modules of a forward"
    if not checkpointed_layers(module):
        return "this family's layers do not go through transformers' checkpointing"
    if has_dropout(module):
        return "dropout: a training forward differs from the sampler's"
    config = module.config.get_text_config()
    tokens = -(-recipe.train.global_batch // world.size) * longest
    need = config.num_hidden_layers * tokens * config.hidden_size * module.dtype.itemsize
    free = -world.max(-free_bytes(world)) - world.max(optimizer_bytes_to_come(engine, world))
    if need > min(RECORDED_SHARE * free, _BESIDE * free - taken):
        micro = f", of which a micro batch takes {taken / GIB:.3g}" if taken else ""
        return f"what a step would record takes {need / GIB:.3g} GiB, {max(free, 0) / GIB:.3g} are free{micro}"
    return ""

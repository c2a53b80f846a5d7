"""How parameters are held while the model generates: one class a strategy.

A strategy has a name, which logs, metrics and the kept call costs show. It holds the parameters for as long as several
batches are sampled, runs before every model call, and ends the sampling of a rank that has no more work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from ssgen_ds.distributed.world import World
from ssgen_ds.errors import GenerationInterrupted
from ssgen_ds.modeling.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Strategy:
    """What a strategy may do; here nothing: the parameters are used as they are.

    Attributes:
        is_collective: a model call is one of all ranks, so that each must make the same number of them.
        held_bytes: what holding the parameters takes on a rank, besides what training has there anyway.
        needed_bytes: what must be free on a rank for it.
        demand: what a user is told of it, a format for GiB; of a strategy that needs no memory nothing is told.
    """

    name: ClassVar[str]
    is_collective: ClassVar[bool] = False
    held_bytes: float = 0
    needed_bytes: float = 0
    demand: ClassVar[str] = ""

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Inside, the model can be called. All ranks enter and leave together."""
        yield

    def before_call(self) -> None:
        """Runs before each model call. Raises GenerationInterrupted on all ranks, where it is a collective."""

    def finish(self) -> None:
        """Runs when this rank has no more work. All ranks call it; it returns when none has."""


class Local(Strategy):
    """ZeRO 0-2: every rank has whole parameters."""

    name = "local"


class Dequantized(Strategy):
    """The same, of a quantised base: its weights are dequantised once for a whole round, not at every call."""

    name = "dequantized"
    demand = "dequantised weights take {:.2f} GiB"

    def __init__(self, module: PreTrainedModel, nbytes: int) -> None:
        self._module = module
        self.held_bytes = self.needed_bytes = nbytes

    @contextmanager
    def parameters(self) -> Iterator[None]:
        from ssgen_ds.modeling.nf4 import dequantized

        with dequantized(self._module):
            yield


class Gathered(Strategy):
    """ZeRO-3: all parameters are gathered once for a whole round. Calls are fast; each rank holds the whole model."""

    name = "gathered"
    demand = "whole parameters take {:.2f} GiB more"

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.held_bytes = shards.total_bytes
        self.needed_bytes = shards.total_bytes + shards.largest_unit_bytes  # its shard is there as well

    @contextmanager
    def parameters(self) -> Iterator[None]:
        with self._shards.gathered():
            yield


class Sharded(Strategy):
    """ZeRO-3: a layer is gathered, used and let go at every call. Calls are slow; little memory is needed.

    Every forward is a collective, and ranks need different numbers of them. A rank announces each call before it makes
    it; one that has run out of work keeps taking part until nobody announces any more.
    """

    name = "sharded"
    is_collective = True

    def __init__(self, shards: Shards, world: World) -> None:
        self._shards = shards
        self._world = world

    @contextmanager
    def parameters(self) -> Iterator[None]:
        with self._shards.sharded():
            yield

    def before_call(self) -> None:
        self._announce(has_work=True)

    def finish(self) -> None:
        while self._announce(has_work=False):
            self._shards.take_part()

    def _announce(self, has_work: bool) -> bool:
        """Whether any rank makes one more call; GenerationInterrupted on all ranks when one was asked to stop."""
        somebody_calls, stop = self._world.any_of(has_work, self._world.stop.is_set)
        if stop:
            raise GenerationInterrupted
        return somebody_calls

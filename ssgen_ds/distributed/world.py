"""A rank's place among the others, and the few decisions that all of them share.

Flags and Python objects travel on a gloo group, so that they never wait for the GPU stream.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ssgen_ds.distributed.peak_memory import PeakMemory
from ssgen_ds.distributed.phases import Phases
from ssgen_ds.distributed.signals import StopFlag
from ssgen_ds.distributed.watchdog import Watchdog
from ssgen_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place, its device, and what it is doing."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    phases: Phases = field(default_factory=Phases)
    stop: StopFlag = field(default_factory=StopFlag)
    watchdog: Watchdog | None = None
    memory: PeakMemory = field(default_factory=PeakMemory)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Be in this phase of the (1-based) step inside, and measure its memory; see `phases.py`, `peak_memory.py`."""
        with self.phases.enter(name, step), self.memory.of(name):
            yield

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set on some rank."""
        value = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(item) for item in value.tolist()]

    def sum(self, *values: float) -> list[float]:
        """Float64 sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.control)
        return float(total.item())

    def gather(self, item: T) -> list[T]:
        """One Python object from every rank, on every rank, in rank order."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def broadcast(self, item: T) -> T:
        """Rank 0's object on every rank."""
        box: list[Any] = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0. Every rank gets its result, or raises the UserError that it has raised there."""
        return cast(T, self.broadcast(self.together(lambda: work() if self.is_main else None)))

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it is refused on one, all raise the same error instead of waiting for ever."""
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"rank {self.rank} on {socket.gethostname()}: {error}"
        problems = list(dict.fromkeys(item for item in self.gather(problem) if item))
        if problems:
            raise UserError("\n".join(problems))
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Rank 0 works first (it fills caches), then the others. `work` keeps its UserErrors: see `errors.Problems`."""
        if self.is_main:
            result = work()
            self.barrier()
            return result
        self.barrier()
        return work()

    def main_first(self, work: Callable[[], T]) -> T:
        """Rank 0 works first (it fills caches), then the others; errors as in `together`."""
        first = self.together(lambda: work() if self.is_main else None)
        rest = self.together(lambda: None if self.is_main else work())
        return first if self.is_main else rest  # type: ignore[return-value]

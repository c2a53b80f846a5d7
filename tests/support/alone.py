"""One rank without a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ssgen_ds.distributed.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Alone(World):
    """Its collectives have nobody to ask. With `size` above 1 it is one of several ranks, the others being silent."""

    def barrier(self) -> None:
        pass

    def any_of(self, *flags: bool) -> list[bool]:
        return [bool(flag) for flag in flags]

    def sum(self, *values: float) -> list[float]:
        return [float(value) for value in values]

    def max(self, value: float) -> float:
        return float(value)

    def gather(self, item: T) -> list[T]:
        return [item]

    def broadcast(self, item: T) -> T:
        return item


def alone(rank: int = 0, size: int = 1, kind: Callable[..., Alone] = Alone) -> Alone:
    return kind(rank, rank, size, torch.device("cpu"), control=None)

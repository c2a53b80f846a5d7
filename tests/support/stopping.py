"""A world that is asked to stop when it first enters a phase, as a signal in the middle of it would."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ssgen_ds.distributed.phases import Phases
from ssgen_ds.distributed.signals import StopFlag
from ssgen_ds.distributed.world import World


@dataclass
class _StoppingPhases(Phases):
    flag: StopFlag = field(default_factory=StopFlag)
    at: str = "train"
    outer: Phases = field(default_factory=Phases)

    def tick(self, name: str = "") -> None:
        super().tick(name)
        self.outer.tick()  # the watchdog looks at that one
        if name == self.at:
            self.flag.is_set = True


def stopping(world: World, at: str = "train") -> World:
    """`world`, whose ranks are all asked to stop when they enter phase `at`."""
    flag = StopFlag()
    return replace(world, stop=flag, phases=_StoppingPhases(world.rank, flag=flag, at=at, outer=world.phases))

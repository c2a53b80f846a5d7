"""Timing: sides in turn, medians, the slowest rank; and the peak of a process's memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssgen_ds.distributed.world import World


@dataclass
class Side:
    """One contestant: what to run, how often, and what came of it."""

    run: Callable[[], Any]
    repeats: int
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(sides: dict[str, Side], world: World) -> None:
    """Run every side in turn, again and again until each has had its repeats. The slowest rank's time counts."""
    for number in range(max(side.repeats for side in sides.values())):
        for name, side in sides.items():
            if number >= side.repeats:
                continue
            gc.collect()
            world.barrier()
            start = time.perf_counter()
            side.results.append(side.run())
            side.seconds.append(world.max(time.perf_counter() - start))
            if world.is_main:
                print(f"  {name}: {side.seconds[-1]:.3g} s", flush=True)


@contextmanager
def peak_memory() -> Iterator[dict[str, float | None]]:
    """Fills in `mib`: by how much the process's resident memory rose at most inside; None where Linux is not."""
    result: dict[str, float | None] = {"mib": None}
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    except OSError:
        yield result
        return
    yield result
    result["mib"] = round((status("VmHWM") - before) / 1024, 1)


def status(name: str) -> int:
    """A field of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

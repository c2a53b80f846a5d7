"""Peaks of this rank's memory by what it was doing: generating, forward and backward, or updating the weights.

On a GPU it is what torch's allocator has handed out there. On a CPU it is the resident size of the process, whose
high-water mark Linux takes back on request; where it does not, the peak is that since the start.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

PHASES = {"generate": "generate", "forward": "train", "backward": "train", "optimizer": "optimizer"}


@dataclass
class PeakMemory:
    """Bytes, by the values of `PHASES`."""

    highest: int = 0  # of all that was measured since the start
    _peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Measure what is done inside, when the phase is one of those that count."""
        if phase not in PHASES:
            yield
            return
        _reset()
        try:
            yield
        finally:
            peak, name = _peak(), PHASES[phase]
            self._peaks[name] = max(self._peaks.get(name, 0), peak)
            self.highest = max(self.highest, peak)

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        peaks, self._peaks = {name: self._peaks.get(name, 0) for name in PHASES.values()}, {}
        return peaks


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Peaks of this rank's memory by what it was doing: generating, forward and backward, or updating the weights.

On a GPU it is what torch's allocator has handed out there. On a CPU it is the resident size of the process, whose
high-water mark Linux takes back on request; where it does not, the peak is that since the start.

What does not fit after all ends as one message with what would make it fit.
"""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ssgen_ds.errors import RankError

PHASES = {"generate": "generate", "forward": "train", "backward": "train", "optimizer": "optimizer"}
_SMALLER = {
    "generate": "lower selfgen.batch, or set selfgen.strategy=sharded",
    "train": "lower train.micro_batch (auto finds the largest that fits), set model.gradient_checkpointing=true, lower "
    "data.max_prompt_tokens, or set deepspeed=ds_configs/zero3.json",
    "optimizer": "set train.optimizer=paged_adamw_8bit, deepspeed=ds_configs/zero3_offload.json, or adapter.kind=lora",
}


@dataclass
class PeakMemory:
    """Bytes, by the values of `PHASES`."""

    highest: int = 0  # of all that was measured since the start
    _peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Measure what is done inside, when the phase is one of those that count.

        Raises:
            RankError: it ran out of memory; the message says what would need less.
        """
        counts = phase in PHASES
        if counts:
            _reset()
        try:
            yield
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise RankError(_what_needs_less(phase, error)) from error
        finally:
            if counts:
                peak, name = _peak(), PHASES[phase]
                self._peaks[name] = max(self._peaks.get(name, 0), peak)
                self.highest = max(self.highest, peak)

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        peaks, self._peaks = {name: self._peaks.get(name, 0) for name in PHASES.values()}, {}
        return peaks


def return_freed_memory() -> None:
    """Make glibc hand large freed tensors back to the system, on a CPU outside ZeRO-3.

    By itself it comes to keep all below 32 MiB in its heap, where what the backward lets go lies beside what it makes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 2**20)
    libc.mallopt(trim_threshold, 64 * 2**20)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of the host, whose allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _what_needs_less(phase: str, error: RuntimeError) -> str:
    smaller = _SMALLER.get(PHASES.get(phase, ""), "a smaller model, quantization.kind=nf4, or more ranks at ZeRO-3")
    what = str(error).strip().splitlines()[0].split("] ")[-1].rstrip(". ")
    return f"out of memory in {phase}: {what}. {smaller}; `ssgen plan` tells what a recipe needs"


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

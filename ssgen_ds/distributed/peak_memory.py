"""Peaks of this rank's memory by what it was doing: generating, forward and backward, or updating the weights.

On a GPU it is what torch's allocator has handed out there. On a CPU it is the resident size of the process, whose
high-water mark Linux takes back on request; where it does not, the peak is that since the start.

What does not fit after all ends as one message with what would make it fit.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ssgen_ds.distributed.device_errors import is_out_of_memory
from ssgen_ds.errors import RankError

PHASES = {"generate": "generate", "forward": "train", "backward": "train", "optimizer": "optimizer"}
# What runs out of memory in a phase inside one of these needs the same advice.
_ADVICE = {
    **PHASES,
    **dict.fromkeys(("mixing", "drafting", "rewriting"), "generate"),
    **dict.fromkeys(("answer", "gap"), "command"),
    "evaluate": "evaluate",
}
_SMALLER = {
    "generate": "lower selfgen.batch, or set selfgen.strategy=sharded",
    "evaluate": "lower train.micro_batch or selfgen.batch",
    "command": "lower --batch, or share the model between ranks with --deepspeed ds_configs/zero3.json",
    "train": "lower train.micro_batch (auto finds the largest that fits), set model.gradient_checkpointing=true, lower "
    "data.max_prompt_tokens, or set deepspeed=ds_configs/zero3.json",
    "optimizer": "set train.optimizer=paged_adamw_8bit, deepspeed=ds_configs/zero3_offload.json, or adapter.kind=lora",
}


@dataclass
class PeakMemory:
    """Bytes, by the values of `PHASES`."""

    highest: int = 0  # the highest peak since the start
    _peaks: dict[str, int] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)  # phases that are not left yet, outermost first

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Measure what is done inside, when the phase is one of those that count.

        Raises:
            RankError: it ran out of memory; the message says what would need less.
        """
        counts = phase in PHASES
        self._open.append(phase)
        if counts:
            _reset()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RankError(_what_needs_less(self._open, error)) from error
        finally:
            self._open.pop()
            if counts:
                peak, name = _peak(), PHASES[phase]
                self._peaks[name] = max(self._peaks.get(name, 0), peak)
                self.highest = max(self.highest, peak)

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        peaks, self._peaks = {name: self._peaks.get(name, 0) for name in PHASES.values()}, {}
        return peaks


def _what_needs_less(phases: list[str], error: RuntimeError) -> str:
    """The advice for the innermost phase that has one."""
    phase = next((phase for phase in reversed(phases) if phase in _ADVICE), phases[-1])
    smaller = _SMALLER.get(_ADVICE.get(phase, ""), "a smaller model, quantization.kind=nf4, or more ranks at ZeRO-3")
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

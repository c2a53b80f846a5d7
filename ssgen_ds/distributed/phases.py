"""Where this rank is: named when something hangs or fails, and where tests inject faults.

    with world.phase("backward", step): ...        a phase, perhaps inside another
    world.phases.tick()                            progress inside a long one

SSGEN_FAULT=kind@phase:rank:step[,...] injects faults when a rank enters a phase at that (1-based) optimizer step:
kill, stop, term, usr1, int (signals to itself), raise (an exception), enospc, eacces (OSError), delay=SECONDS.
A phase may be entered often (`pass`: a model call of the sampler); each fault strikes once in a process.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ssgen_ds.errors import UserError

FAULT_VARIABLE = "SSGEN_FAULT"
_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}
_OS_ERRORS = {"enospc": errno.ENOSPC, "eacces": errno.EACCES}
KINDS = (*_SIGNALS, *_OS_ERRORS, "raise", "delay=SECONDS")


@dataclass(frozen=True)
class Fault:
    """One injected fault; `step` counts from 1."""

    kind: str
    phase: str
    rank: int
    step: int

    def strike(self) -> None:
        """Do it to this process."""
        name, _, argument = self.kind.partition("=")
        if name in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[name])
        elif name in _OS_ERRORS:
            code = _OS_ERRORS[name]
            raise OSError(code, f"{os.strerror(code)} (injected in {self.phase})")
        elif name == "raise":
            raise RuntimeError(f"injected in {self.phase} at step {self.step}")
        else:
            time.sleep(float(argument))


def parse_faults(text: str) -> list[Fault]:
    """The value of SSGEN_FAULT. Raises UserError with the form it must have."""
    faults = []
    for item in text.split(","):
        try:
            kind, place = item.strip().split("@")
            phase, rank, step = place.split(":")
            fault = Fault(kind, phase, int(rank), int(step))
            name, _, argument = kind.partition("=")
            if name == "delay":
                float(argument)
            elif name not in KINDS or argument:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{FAULT_VARIABLE}: {item!r} is not kind@phase:rank:step with a kind of {', '.join(KINDS)}"
            ) from None
        faults.append(fault)
    return faults


@dataclass
class Phases:
    """The phases that this rank is in, outermost first, and when it last made progress.

    Args:
        rank: of this process, for faults.
        faults: still to strike; empty costs one comparison a phase.
        clock: seconds, monotonic.
    """

    rank: int = 0
    faults: list[Fault] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    step: int = 0  # 1-based optimizer step in progress; 0 before the first
    names: tuple[str, ...] = ("start",)
    failed_in: str = ""  # the innermost place that the last exception has left
    progress: float = field(init=False)  # clock time of the last phase entered or left, or tick

    def __post_init__(self) -> None:
        self.progress = self.clock()

    @contextmanager
    def enter(self, name: str, step: int | None = None) -> Iterator[None]:
        """Be in phase `name` inside; `step` is the 1-based optimizer step, the enclosing phase's when not given."""
        outer = self.names, self.step
        self.names, self.step = (*self.names, name), self.step if step is None else step
        try:
            self.tick(name)
            yield
        except BaseException as error:
            # Kept on the error itself: it passes through the outer phases, too, and an id may be used again.
            self.failed_in = error.__dict__.setdefault("failed_in", self.place)
            raise
        finally:
            self.names, self.step = outer
            self.progress = self.clock()

    def tick(self, name: str = "") -> None:
        """Progress; `name` is a phase too short to be worth naming when something hangs, for faults only."""
        self.progress = self.clock()
        if self.faults:
            self._strike(name)

    def _strike(self, name: str) -> None:
        here = (name, self.rank, self.step)
        for fault in [item for item in self.faults if (item.phase, item.rank, item.step) == here]:
            self.faults.remove(fault)
            fault.strike()

    @property
    def place(self) -> str:
        """For messages: `backward of step 12`."""
        name = self.names[-1]
        return f"{name} of step {self.step}" if self.step else name

    @property
    def seconds(self) -> float:
        """Seconds since the last progress."""
        return self.clock() - self.progress


def phases_from_environment(rank: int) -> Phases:
    """Phases that inject the faults of SSGEN_FAULT, if it is set."""
    text = os.environ.get(FAULT_VARIABLE, "")
    return Phases(rank, parse_faults(text) if text else [])

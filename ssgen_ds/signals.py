"""Stop on request. The handler only records; ranks agree at the sampler's next pass or at the next step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by the first stop signal, here or on another rank; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.is_set = False

    def handle(self, number: int, frame: Any) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that this thread starts inside never get the stop signals.

    SLURM signals every process of a job and a terminal every process of its group: the compiler of an operator would
    die of it. Nothing is lost for this process: another thread of it gets the signal, or it waits until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Install the handlers, and put back what was there before."""
    flag = StopFlag()
    previous = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

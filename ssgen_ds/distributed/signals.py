"""Stop on request. The handler only records; ranks agree at the sampler's next pass or at the next step."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopFlag:
    """Set by the first stop signal, here or on another rank; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.is_set = False

    def handle(self, number: int, frame: Any) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True
        if number == signal.SIGHUP:
            _leave_terminal()


def _leave_terminal() -> None:
    """The terminal has gone: a line written to it would be an error, and end the run before its checkpoint."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):  # it was closed from the start
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty says no to a terminal that has gone
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that this thread starts inside never get the stop signals.

    SLURM signals every process of a job and a terminal every process of its group: the compiler of an operator would
    die of it. Nothing is lost for this process: another of its threads gets the signal, or it waits until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Install the handlers, and put back what was there before.

    Under nohup a hangup is ignored, and stays so: that is what nohup is for.
    """
    flag = StopFlag()
    heeded = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, flag.handle) for number in heeded}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

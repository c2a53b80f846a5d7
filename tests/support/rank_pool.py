"""One start of ranks, as the pytest that started them sees it: it names a test, and all ranks run that and report."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT, environment, free_port

Reports = list[dict[str, Any]]  # of one test on one rank: setup, call, teardown

GRACE_SECONDS = 60.0  # in which the other ranks end a test that has failed on one of them
_START_SECONDS = 300.0  # for the ranks to import everything and to meet
_STACK_SECONDS = 3.0  # in which a rank that hangs writes where it hangs
_CLOSE_SECONDS = 60.0  # for the ranks to leave after their last test


class RanksLost(Exception):
    """A rank has died or hangs; the message says which, and ends with what it has written last."""


class RankPool:
    """`size` ranks that run tests of the modules at `paths`.

    `lost_in` is the module in which they were lost, if they were.
    """

    def __init__(self, size: int, paths: list[Path], folder: Path, config: pytest.Config) -> None:
        self._seconds = float(config.getini("ranks_seconds"))
        self._has_started = False
        self.lost_in: Path | None = None
        self._lost = ""
        self._logs = [folder / f"rank{rank}of{size}.log" for rank in range(size)]
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        port = str(free_port())
        options = [f"--tb={config.option.tbstyle}", *["-v"] * config.option.verbose, *["-l"] * config.option.showlocals]
        for rank in range(size):
            mine, theirs = Pipe()
            command = [*(sys.executable, "-m", "tests.support.rank_worker"), str(theirs.fileno()), str(folder)]
            place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            with self._logs[rank].open("wb") as log:
                process = subprocess.Popen(
                    [*command, *map(str, paths), *options],
                    **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": ROOT},
                    env=environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            theirs.close()  # so that the rank's end is noticed
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, item: pytest.Item, next_nodeid: str | None) -> list[Reports]:
        """Run a test on all ranks, and return the reports of each. RanksLost, once raised, is raised ever after."""
        if self._lost:
            raise RanksLost(self._lost)
        try:
            if not self._has_started:
                self._answers(_START_SECONDS)
                self._has_started = True
            for connection in self._connections:
                connection.send((item.nodeid, next_nodeid))
            return self._answers(self._seconds)
        except (RanksLost, OSError) as error:
            self.kill()
            self.lost_in, self._lost = item.path, f"not run: the ranks were lost in {item.nodeid}"
            raise error if isinstance(error, RanksLost) else RanksLost(self._last_words(error)) from error

    def _answers(self, seconds: float) -> list[Reports]:
        """One from each rank: that it has joined the others, without a report, or the reports of a test."""
        found: dict[int, Reports] = {}
        end = time.monotonic() + seconds
        while len(found) < len(self._connections):
            open_ones = [one for rank, one in enumerate(self._connections) if rank not in found]
            ready = wait(open_ones, max(0.0, end - time.monotonic()))
            if not ready:
                raise RanksLost(self._hanging(found))
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    found[rank] = connection.recv()
                except (EOFError, ConnectionError):
                    raise RanksLost(self._dead(rank, found)) from None
                if any(report["outcome"] == "failed" for report in found[rank]):
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        return [found[rank] for rank in range(len(found))]

    def _dead(self, rank: int, found: dict[int, Reports]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(_STACK_SECONDS)
        ended = f"rank {rank} ended with {self._processes[rank].returncode} before it answered"
        return f"{ended}\n{failures(found)}{self._written(rank)}"

    def _hanging(self, found: dict[int, Reports]) -> str:
        hanging = [rank for rank in range(len(self._connections)) if rank not in found]
        for rank in hanging:
            self._processes[rank].send_signal(signal.SIGABRT)  # pytest's faulthandler writes all stacks
        time.sleep(_STACK_SECONDS)
        who = ", ".join(f"rank {rank}" for rank in hanging)
        return f"no answer in time from {who}\n{failures(found)}" + "".join(self._written(rank) for rank in hanging)

    def _written(self, rank: int) -> str:
        return f"--- rank {rank} wrote last\n{self._logs[rank].read_text('utf-8', 'replace')[-8000:]}\n"

    def _last_words(self, error: Exception) -> str:
        return f"{error}\n" + "".join(self._written(rank) for rank in range(len(self._connections)))

    def kill(self) -> None:
        """End the ranks now, and what they have started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def close(self) -> None:
        """Let the ranks leave, and kill those that do not."""
        for connection in self._connections:
            connection.close()
        end = time.monotonic() + _CLOSE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.kill()


def failures(found: dict[int, Reports]) -> str:
    """What ranks say that have reported a failure."""
    failed = [(rank, one) for rank, reports in found.items() for one in reports if one["outcome"] == "failed"]
    return "".join(f"--- rank {rank} failed in {one['when']}\n{text_of(one)}\n" for rank, one in failed)


def text_of(report: dict[str, Any]) -> str:
    return pytest.TestReport._from_json(report).longreprtext

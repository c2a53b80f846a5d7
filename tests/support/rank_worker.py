"""One rank: a pytest that runs the tests that it is told to. `python -m tests.support.rank_worker FD FOLDER ARGUMENTS`.

It collects the modules in ARGUMENTS, joins the process group, and then reads names of tests from the connection at FD,
and writes reports there, until the other end is closed.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.distributed.launch import quiet_libraries
from ssgen_ds.distributed.process_group import process_group
from ssgen_ds.distributed.world import World
from ssgen_ds.recipe.schema import RecoveryConfig

_IDLE_SECONDS = 1.0  # between two signs of progress while there is nothing to do


class RankWorker:
    """The plugin that takes the place of pytest's loop over the tests."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self._connection, self._folder = connection, folder
        self._world: World | None = None
        self._reports: list[pytest.TestReport] = []

    @pytest.fixture(scope="session")
    def world(self) -> World:
        assert self._world is not None
        return self._world

    @pytest.fixture(scope="session")
    def folder(self) -> Path:
        return self._folder

    @pytest.fixture
    def kept(self, request: pytest.FixtureRequest, world: World, folder: Path) -> Iterator[dict[str, Any]]:
        file = folder / "kept" / hashlib.sha256(request.node.nodeid.encode()).hexdigest()
        kept = pickle.loads(file.read_bytes()) if file.is_file() else {}
        yield kept
        if world.is_main:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(pickle.dumps(kept))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with process_group(RecoveryConfig(collective_timeout=300)) as self._world:
            self._connection.send([])  # it has met the others
            while (names := self._next_names()) is not None:
                item, next_item = (items.get(name) for name in names)
                assert item is not None, f"the ranks have collected no {names[0]}"
                # What is open may be what another test needs than comes now: several pytests share the files out.
                session._setupstate.teardown_exact(item)
                self._reports = []
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
                gc.collect()  # engines hold themselves in cycles, and many tests share this process
                hook = session.config.hook.pytest_report_to_serializable
                self._connection.send([hook(config=session.config, report=report) for report in self._reports])
        return True

    def _next_names(self) -> tuple[str, str | None] | None:
        """The test to run and the one after it; none when there are no more. Waiting counts as progress."""
        try:
            while not self._connection.poll(_IDLE_SECONDS):
                self._world.phases.tick()
            return self._connection.recv()
        except (EOFError, ConnectionError):
            return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)


def main(fd: str, folder: str, *arguments: str) -> int:
    quiet_libraries()
    # The cache is the other pytest's, as are the limits; warnings go to the log, as in a program.
    options = ["-p", "no:cacheprovider", "-p", "no:warnings", "-p", "no:ranks", "-o", "timeout=0"]
    return pytest.main([*options, *arguments], plugins=[RankWorker(Connection(int(fd)), Path(folder))])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""What was generated for an example at its last visit: a guess for this visit, read from the run's own files.

Only rounds before the one that is being generated count. They are on disk whether or not the run was interrupted, and
nothing later is read, so that a resumed run makes the calls of an uninterrupted one. Guesses decide what generation
costs, never what it gives: a file that is gone is worth a warning and no more.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from ssgen_ds.distributed.world import World
from ssgen_ds.run.layout import round_path
from ssgen_ds.selfgen.generated import Generated
from ssgen_ds.selfgen.round_file import from_row, read_round, to_row

logger = logging.getLogger(__name__)


class History:
    """Finds earlier visits. Rank 0 keeps the latest visit of each example in a table of its own, which SQLite spills to
    a temporary file: a round's file is read once, and a look-up costs the same however many rounds there are.

    Args:
        run_dir: the run's output folder.
        world: the ranks; all must ask for the same rounds in the same order.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir = run_dir
        self._world = world
        self._table: sqlite3.Connection | None = None
        self._indexed = 0  # rounds 1.._indexed are in the table
        self._warned = False

    def before(self, number: int, example_ids: Iterable[str]) -> dict[str, Generated]:
        """The latest visit of each example in the rounds 1..number-1, on every rank; absent where there is none.

        Rounds are asked for in rising order. Every rank calls it: it is a collective.
        """
        return self._world.broadcast(self._find(number, set(example_ids)) if self._world.is_main else {})

    def _find(self, number: int, example_ids: set[str]) -> dict[str, Generated]:
        try:
            table = self._open()
            for earlier in range(self._indexed + 1, number):
                self._index(table, earlier)
                self._indexed = earlier
            rows = (
                table.execute("SELECT record FROM visits WHERE example_id = ?", (example_id,)).fetchone()
                for example_id in sorted(example_ids)
            )
            records = [from_row(json.loads(row[0])) for row in rows if row is not None]
        except sqlite3.Error as error:  # its temporary file has no room
            self._warn("the table of earlier visits", error)
            return {}
        return {record.example_id: record for record in records}

    def _open(self) -> sqlite3.Connection:
        if self._table is None:
            # "": a private database in a temporary file that is gone with the process.
            self._table = sqlite3.connect("", isolation_level=None)
            self._table.execute("PRAGMA journal_mode = OFF")
            self._table.execute("CREATE TABLE visits (example_id TEXT PRIMARY KEY, record TEXT) WITHOUT ROWID")
        return self._table

    def _index(self, table: sqlite3.Connection, number: int) -> None:
        """Take in one round, in the order of its slots: where it visits an example twice, the later visit stays."""
        path = round_path(self._run_dir, number)
        try:
            records = read_round(path)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            self._warn(path, error)
            return
        rows = [(record.example_id, json.dumps(to_row(record))) for record in records]
        table.execute("BEGIN")
        table.executemany("INSERT OR REPLACE INTO visits VALUES (?, ?)", rows)
        table.execute("COMMIT")

    def _warn(self, what: object, error: Exception) -> None:
        """Once."""
        if not self._warned:
            problem = type(error).__name__
            logger.warning("cannot read %s (%s): earlier visits are no guesses, generation costs more", what, problem)
        self._warned = True

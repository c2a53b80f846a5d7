"""What was generated for an example when it was last visited: a guess for this visit, read from the run's own files.

Only rounds before the one being generated count. They are on disk whether or not the run was interrupted since, and
later files of an abandoned continuation are never looked at: a resumed run makes the calls of the uninterrupted one.
Guesses decide what generation costs, never what it gives, so a file that is gone is worth a warning and no more.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from ssgen_ds.distributed import World
from ssgen_ds.selfgen.rounds import Generated
from ssgen_ds.selfgen.store import read_example_ids, read_round, round_path

logger = logging.getLogger(__name__)
T = TypeVar("T")


class History:
    """Finds earlier visits. Rank 0 keeps which round last visited each example, nothing else; the tokens stay on disk.

    Args:
        run_dir: the run's output folder.
        world: the ranks; all must ask for the same rounds in the same order.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir = run_dir
        self._world = world
        self._last_round: dict[str, int] = {}
        self._indexed = 0  # rounds 1.._indexed are in _last_round
        self._warned = False

    def before(self, number: int, example_ids: Iterable[str]) -> dict[str, Generated]:
        """The latest visit of each example in the rounds 1..number-1, on every rank; absent where there is none.

        Rounds are asked for in rising order. Every rank calls it: it is a collective.
        """
        return self._world.broadcast(self._find(number, set(example_ids)) if self._world.is_main else {})

    def _find(self, number: int, example_ids: set[str]) -> dict[str, Generated]:
        for earlier in range(self._indexed + 1, number):
            self._last_round |= dict.fromkeys(self._read(earlier, read_example_ids), earlier)
        self._indexed = max(self._indexed, number - 1)
        wanted: dict[int, list[str]] = defaultdict(list)
        for example_id in example_ids & self._last_round.keys():
            wanted[self._last_round[example_id]].append(example_id)
        found: dict[str, Generated] = {}
        for earlier, ids in sorted(wanted.items()):
            # In the order of the slots: where a round visits an example twice, the later visit stays.
            found |= {record.example_id: record for record in self._read(earlier, read_round, ids)}
        return found

    def _read(self, number: int, read: Callable[..., list[T]], *arguments: object) -> list[T]:
        """`read(path, *arguments)` of a round's file, or nothing when it cannot be read: said once."""
        path = round_path(self._run_dir, number)
        try:
            return read(path, *arguments)
        except (OSError, pa.ArrowException) as error:
            if not self._warned:
                problem = type(error).__name__
                logger.warning(
                    "cannot read %s (%s): earlier visits are no guesses, generation costs more", path, problem
                )
            self._warned = True
            return []

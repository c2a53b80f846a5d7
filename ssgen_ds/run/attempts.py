"""Stop a run that starts again and again without progress: `attempts.jsonl` remembers its starts and ends.

{"recipe": "5f0c...", "job": "4711", "time": ...}                                a start
{"step": 12, "time": ...}                                                        the step to continue from, once known
{"outcome": "failed", "reason": "rank 1 on n2, backward of step 13: ...", ...}   how it ended; absent after a kill
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import NonFiniteError, StopRequested, UserError
from ssgen_ds.recipe.load import dump_recipe
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.files import append_whole
from ssgen_ds.run.layout import ATTEMPTS_FILE
from ssgen_ds.run.lock import owner_of
from ssgen_ds.run.read_back import AttemptRow, read_rows

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World

log = logging.getLogger(__name__)
FAILED, STOPPED, FINISHED = "failed", "stopped", "finished"


@dataclass
class Attempts:
    """The starts of one run. Rank 0 begins an attempt; any rank may say how it ended."""

    file: Path
    owner: str | None = None  # the token of the job that holds the run folder during this attempt; see lock.py
    _earlier: list[dict[str, Any]] = field(default_factory=list, init=False)  # rows before this attempt
    _size: int = field(default=0, init=False)  # of these rows, in bytes

    @classmethod
    def of(cls, run_dir: Path) -> Attempts:
        return cls(run_dir / ATTEMPTS_FILE, owner_of(run_dir))

    def begin(self, recipe: Recipe) -> None:
        """Note a start. Raises UserError when the last starts with this recipe crashed before they knew their step."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self._earlier = read_rows(
                self.file, AttemptRow, "delete this line, or the file: it holds the starts so far"
            )
            self._size = self.file.read_bytes().rfind(b"\n") + 1
            os.truncate(self.file, self._size)  # drop a line that a kill cut short
        self._refuse_loops(None, recipe)
        self._append({"recipe": _digest(recipe), "job": _job()})

    def reach(self, step: int, recipe: Recipe) -> None:
        """Note that the run continues from `step`. Raises UserError when the last starts did not pass it."""
        self._refuse_loops(step, recipe)
        self._append({"step": step})

    def _refuse_loops(self, step: int | None, recipe: Recipe) -> None:
        limit = recipe.recovery.max_restarts
        reasons = vain_starts(self._earlier, step, _digest(recipe), _job())
        if limit and len(reasons) > limit:
            where = "before its first step was known" if step is None else f"from step {step}"
            raise UserError(
                f"{self.file.parent}: started {len(reasons)} times {where} and never got further; the last time: "
                f"{reasons[-1]}; mend the cause (if it was stopped each time: too short a time limit), then start it "
                f"with a changed recipe, with recovery.max_restarts=0 (no limit), or after removing {self.file}"
            )

    def withdraw(self) -> None:
        """Take back a start that was refused: it does not count."""
        if self._size:
            os.truncate(self.file, self._size)
        else:
            self.file.unlink(missing_ok=True)

    def end(self, outcome: str, reason: str) -> None:
        try:
            self._append({"outcome": outcome, "reason": reason})
        except OSError as error:  # a full disk: the rest of the run folder does not need this line
            log.warning("%s: how this start ended was not noted: %s", self.file, error)

    def failed(self, reason: str) -> None:
        """Note a failure just before the process ends. A full or missing disk must not hide the first error.

        A job whose folder was taken over must not write for the job that has it now.
        """
        try:
            if self.file.is_file() and owner_of(self.file.parent) in (None, self.owner):
                self.end(FAILED, reason)
        except OSError:
            return

    def _append(self, row: dict[str, Any]) -> None:
        append_whole(self.file, json.dumps({**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")


@contextmanager
def attempt(recipe: Recipe, world: World) -> Iterator[Callable[[int | None], None]]:
    """One attempt of the run in `output_dir`; a rank or a watchdog that fails notes how it ended.

    Yields a function that all ranks call once they know the step to continue from, or None for nothing to do.
    """
    attempts, is_idle = Attempts.of(Path(recipe.output_dir)), False
    world.together(lambda: attempts.begin(recipe) if world.is_main else None)
    if world.watchdog is not None:
        world.watchdog.last_words = attempts.failed

    def reach(step: int | None) -> None:
        nonlocal is_idle
        is_idle = step is None
        world.together(lambda: attempts.reach(step, recipe) if world.is_main and step is not None else None)

    try:
        yield reach
    except UserError:
        if world.is_main:
            attempts.withdraw()
        raise
    except StopRequested as stopped:
        if world.is_main:
            attempts.end(STOPPED, str(stopped))
        raise
    except NonFiniteError as error:
        if world.is_main:
            attempts.failed(str(error))
        raise
    if world.is_main:
        attempts.withdraw() if is_idle else attempts.end(FINISHED, "")


def vain_starts(rows: list[dict[str, Any]], step: int | None, recipe: str, job: str) -> list[str]:
    """Reasons why the latest starts by this recipe all ended where they had begun, at `step`; oldest first.

    A start that ended before its step was known counts for every step. A stop on request is no fault, but a SLURM job
    that was stopped there and requeued itself is in a loop as well.
    """
    starts: list[dict[str, Any]] = []
    for row in rows:
        if "recipe" in row:
            starts.append({"step": None, "outcome": FAILED, "reason": _WITHOUT_A_WORD, "has_ended": False} | row)
        elif not starts:
            continue  # the file was cut by hand
        elif "step" in row:
            starts[-1]["step"] = row["step"]
        elif not starts[-1]["has_ended"]:  # several ranks may report; the first report counts
            starts[-1] |= row | {"has_ended": True}
    reasons: list[str] = []
    for start in reversed(starts):
        is_here = start["recipe"] == recipe and start["step"] in (None, step)
        is_vain = start["outcome"] == FAILED or (start["outcome"] == STOPPED and job and start["job"] == job)
        if not (is_here and is_vain):
            break
        reasons.append(start["reason"])
    return reasons[::-1]


_WITHOUT_A_WORD = "it ended without a word (killed, or its node was lost)"


def _digest(recipe: Recipe) -> str:
    return hashlib.blake2b(dump_recipe(recipe).encode(), digest_size=8).hexdigest()


def _job() -> str:
    """The id of the SLURM job, which a requeue keeps; "" outside SLURM."""
    return os.environ.get("SLURM_JOB_ID", "")

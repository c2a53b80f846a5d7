"""A run that crashes at the same step again and again is stopped: `attempts.jsonl` remembers each start and its end.

{"step": 12, "recipe": "5f0c...", "job": "4711", "time": ...}                      a start, from step 12
{"outcome": "failed", "reason": "rank 1 on n2, backward of step 13: ...", ...}     how it ended; absent after a kill
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.config import Recipe, dump_recipe
from ssgen_ds.errors import NonFiniteError, StopRequested, UserError
from ssgen_ds.logbook import read_rows

if TYPE_CHECKING:
    from ssgen_ds.distributed import World

ATTEMPTS_FILE = "attempts.jsonl"
FAILED, STOPPED, FINISHED = "failed", "stopped", "finished"


@dataclass(frozen=True)
class Attempts:
    """The starts of one run. Rank 0 begins an attempt; any rank may say how it ended."""

    file: Path

    @classmethod
    def of(cls, run_dir: Path) -> Attempts:
        return cls(run_dir / ATTEMPTS_FILE)

    def begin(self, step: int, recipe: Recipe) -> None:
        """Note a start from `step`. Raises UserError when the last ones by this recipe crashed without passing it."""
        digest = hashlib.blake2b(dump_recipe(recipe).encode(), digest_size=8).hexdigest()
        rows = read_rows(self.file) if self.file.is_file() else []
        crashed = crashes_in_a_row(rows, step, digest)
        limit = recipe.recovery.max_restarts
        if limit and len(crashed) > limit:
            raise UserError(
                f"{self.file.parent}: started {len(crashed)} times from step {step} and never got further; the last "
                f"time: {crashed[-1]}; mend the cause, then start it with a changed recipe, with "
                f"recovery.max_restarts=0 (no limit), or after removing {self.file}"
            )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._append({"step": step, "recipe": digest, "job": os.environ.get("SLURM_JOB_ID", "")})

    def withdraw(self) -> None:
        """The start was refused: it did not happen."""
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]
        if lines:
            self.file.write_text("".join(lines), encoding="utf-8")
        else:
            self.file.unlink()

    def end(self, outcome: str, reason: str) -> None:
        self._append({"outcome": outcome, "reason": reason})

    def failed(self, reason: str) -> None:
        """For a process that is about to end: a disk that is full or away must not hide the first error."""
        try:
            if self.file.is_file():
                self.end(FAILED, reason)
        except OSError:
            return

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def attempt(step: int, recipe: Recipe, world: World) -> Iterator[None]:
    """One attempt of the run in `output_dir`, from `step`; a rank or a watchdog that fails notes how it ended."""
    attempts = Attempts.of(Path(recipe.output_dir))
    world.together(lambda: attempts.begin(step, recipe) if world.is_main else None)
    if world.watchdog is not None:
        world.watchdog.last_words = attempts.failed
    try:
        yield
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
        attempts.end(FINISHED, "")


def crashes_in_a_row(rows: list[dict[str, Any]], step: int, recipe: str) -> list[str]:
    """Reasons of the latest attempts that all started from this step by this recipe and crashed; oldest first."""
    attempts: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    for row in rows:
        if "outcome" not in row:
            attempts.append((row, None))
        elif attempts and attempts[-1][1] is None:  # of several ranks' last words the first counts
            attempts[-1] = (attempts[-1][0], row)
    reasons: list[str] = []
    for start, end in reversed(attempts):
        if (start["step"], start["recipe"]) != (step, recipe) or (end is not None and end["outcome"] != FAILED):
            break
        reasons.append(end["reason"] if end else "it ended without a word (killed, or its node was lost)")
    return reasons[::-1]

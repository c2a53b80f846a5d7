"""Answers are kept as they come, so that an evaluation continues after it was stopped or killed."""

from __future__ import annotations

import json
import os
import sys
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import UserError
from ssgen_ds.run.files import write_or_undo, write_whole
from ssgen_ds.run.layout import journal_file
from ssgen_ds.run.read_back import PredictionRow, problem_of

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World


class Journal:
    """`.NAME.partial.jsonl` next to the result: what is evaluated, then a prediction on each line. Rank 0 writes.

    Args:
        out: the result's file.
        group: predictions for each example. If a kill left an example with fewer, all of them are made again.
        identity: what decides the predictions; a journal with another identity is started over.
        world: every rank learns how many predictions there are.
    """

    def __init__(self, out: Path, identity: dict[str, Any], world: World, group: int = 1) -> None:
        self._group = group
        self.file = journal_file(out)
        self._world = world
        self._stream: FileIO | None = None
        world.together(lambda: self._open(json.dumps(identity, ensure_ascii=False)) if world.is_main else None)

    def _open(self, identity: str) -> None:
        lines = self._whole_lines()
        if lines and json.loads(lines[0]) != json.loads(identity):
            print(f"{self.file}: answers of another model, other data or settings; starting over", file=sys.stderr)
            lines = []
        lines = lines[: 1 + (len(lines) - 1) // self._group * self._group] if lines else []
        if len(lines) > 1:
            print(f"going on after {len(lines) - 1} answers", file=sys.stderr)
        # Written again: a line that was cut by a kill must not stay in the middle.
        write_whole(self.file, "".join(f"{line}\n" for line in lines or [identity]))
        self._stream = open(self.file, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)

    def _whole_lines(self) -> list[str]:
        """The identity and the predictions before the first one that is torn, damaged or misplaced.

        The file is read as bytes: a kill may have cut the last line inside a character.
        """
        if not self.file.is_file():
            return []
        whole: list[str] = []
        for line in self.file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # broken JSON, or a broken character
                break
            if whole and not self._is_next(row, len(whole) - 1):
                break
            whole.append(line.decode("utf-8"))
        return whole

    def _is_next(self, row: Any, number: int) -> bool:
        """Whether the row is the prediction that belongs in this place. A lost one is made again, identically."""
        index, sample = divmod(number, self._group)
        if not isinstance(row, dict) or problem_of(row, PredictionRow):
            return False
        return (row["index"], row["sample"]) == (index, sample)

    @property
    def num_rows(self) -> int:
        """The number of predictions kept, the same on every rank. All ranks ask together."""
        return self._world.broadcast(len(self.rows()) if self._world.is_main else 0)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Keep all predictions of one example. Rank 0. Raises UserError as `check_owner` does."""
        assert self._stream is not None
        self.check_owner()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_or_undo(self._stream, lines.encode())

    def check_owner(self) -> None:
        """Raise UserError when another process has started the same evaluation and replaced our file."""
        assert self._stream is not None
        ours = os.fstat(self._stream.fileno())
        if not (self.file.is_file() and os.path.samestat(ours, self.file.stat())):
            raise UserError(
                f"{self.file}: another process has begun the same evaluation and goes on with it; this one ends. "
                "To have both, name another --out"
            )

    def rows(self) -> list[dict[str, Any]]:
        """All predictions. Rank 0."""
        return [json.loads(line) for line in self._whole_lines()[1:]]

    def close_for_good(self) -> None:
        """The result is written: the journal is not needed any more. Rank 0."""
        self.file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()

"""Answers kept as they come, so that an evaluation that was stopped or killed goes on where it was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from ssgen_ds.errors import UserError
from ssgen_ds.files import write_whole

if TYPE_CHECKING:
    from ssgen_ds.distributed import World


class Journal:
    """`.NAME.partial.jsonl` beside the result: what is being evaluated, then one prediction a line. Rank 0 writes.

    Args:
        out: the result's file.
        group: predictions of one example; those of an example that a kill has cut are made again.
        identity: what decides the predictions; a journal of another identity is left behind and begun anew.
        world: every rank learns how many predictions there are.
    """

    def __init__(self, out: Path, identity: dict[str, Any], world: World, group: int = 1) -> None:
        self._group = group
        self.file = out.with_name(f".{out.stem}.partial.jsonl")
        self._world = world
        self._stream: IO[str] | None = None
        world.together(lambda: self._open(json.dumps(identity, ensure_ascii=False)) if world.is_main else None)

    def _open(self, identity: str) -> None:
        lines = self._whole_lines()
        if lines and lines[0] != identity:
            print(f"{self.file}: answers of another model, other data or settings; starting over", file=sys.stderr)
            lines = []
        lines = lines[: 1 + (len(lines) - 1) // self._group * self._group] if lines else []
        if len(lines) > 1:
            print(f"going on after {len(lines) - 1} answers", file=sys.stderr)
        # Written anew: a line that was cut by a kill must not stay in the middle.
        write_whole(self.file, "".join(f"{line}\n" for line in lines or [identity]))
        self._stream = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def _whole_lines(self) -> list[str]:
        """Read as bytes: a kill may have cut the last line inside of a character."""
        if not self.file.is_file():
            return []
        whole = []
        for line in self.file.read_bytes().split(b"\n"):
            try:
                json.loads(line)
            except ValueError:  # broken JSON, or a broken character
                break
            whole.append(line.decode("utf-8"))
        return whole

    @property
    def num_rows(self) -> int:
        """Predictions kept, the same on every rank. All ranks ask together."""
        return self._world.broadcast(len(self.rows()) if self._world.is_main else 0)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Keep all predictions of one example. Rank 0. Raises UserError as `check_owner` does."""
        assert self._stream is not None
        self.check_owner()
        self._stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._stream.flush()

    def check_owner(self) -> None:
        """Raise UserError when another process has begun this evaluation, too, and put its file in place of ours."""
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
        """The result is written: nothing is left to go on with. Rank 0."""
        self.file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """All or nothing: a reader never finds half a file."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

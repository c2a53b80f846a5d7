"""F6: what happens to the files of a checkpoint that two ranks have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def truncate(path: Path) -> None:
    file = path / "shard-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    file = path / "shard-00000-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip_a_bit,
    "shard-missing": lambda path: (path / "shard-00001-of-00002.safetensors").unlink(),
    "marker-empty": lambda path: (path / "COMPLETE").write_text(""),
    "marker-missing": lambda path: (path / "COMPLETE").unlink(),
    "index-changed": lambda path: (path / "index.json").write_text("{}"),
    "round-missing": lambda path: (path / "round.parquet").unlink(),
}

"""What happens to files: those of a checkpoint that two ranks have written (F6), any others, and disks without room."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


FILES: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda content: content[: max(1, len(content) - 9)],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\x00\xfe\x81 not what was here \n{" * 3,
    "nul-tail": lambda content: content + b"\0" * 512,
    "other-shape": lambda content: b'{"a": [1]}\n',
    "a-list": lambda content: b"[1, 2]\n",
}  # what a killed write, a power cut or a person may leave of any file


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file grows beyond `size` bytes: the kernel takes what fits of a write and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

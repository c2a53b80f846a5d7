"""Files and folders that appear whole or not at all, also when the disk fills or the machine stops.

The umask decides who may read them, not the library that wrote them: safetensors makes files with mode 600 and
`tempfile` makes folders with mode 700.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ssgen_ds.run.layout import PARTIAL


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text and fsync it; a reader sees the old file or the new one. Raises OSError."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise named(error, path) from None


def append_whole(path: Path, lines: str) -> None:
    """Add lines and fsync them, or leave everything as it was, even a missing file. Raises OSError."""
    with open(path, "ab", buffering=0) as stream:
        write_or_undo(stream, lines.encode(), is_synced=True)


def write_or_undo(stream: FileIO, data: bytes, is_synced: bool = False) -> None:
    """Write all data to the end of a raw file and fsync it if asked, or leave the file as it was. Raises OSError."""
    size = stream.seek(0, os.SEEK_END)
    try:
        while data:  # a raw stream may accept only a part
            data = data[stream.write(data) :]
        if is_synced:
            os.fsync(stream.fileno())
    except OSError as error:
        with suppress(OSError):
            stream.truncate(size)
            if size == 0:
                os.unlink(stream.name)
        raise named(error, stream.name) from None


def named(error: OSError, path: str | Path) -> OSError:
    """The same error with the name of its file: errors of writing and syncing lack it, those of opening have it."""
    return error if error.filename is not None else OSError(error.errno, error.strerror or str(error), str(path))


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be created in an existing folder. Its mode alone does not tell."""
    probe = folder / f"{PARTIAL}{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder next to `final` to write in. It replaces `final` at the end, and is removed on an error.

    Raises OSError: it cannot be written; what was there before stays.
    """
    final = final.resolve()  # "." has no name
    partial = final.with_name(f"{PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a write that was cut short
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, final)
    except SafetensorError as error:  # also raised for a full disk
        raise OSError(f"{final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, final: Path) -> None:
    """Give the complete folder `partial` its final name; an older folder with that name is removed. Raises OSError."""
    set_modes(partial)
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    fsync(final.parent)


def set_modes(folder: Path) -> None:
    """Give every file in a folder that `mkdir` made the mode that the umask gives to new files.

    The folder's own mode is 777 without the bits of the umask, and that of a file is 666 without them.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_lines(out: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, all or nothing: a reader never finds half a file."""
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """All or nothing: a reader never finds half a file."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

"""Files and folders that appear whole or not at all, also when the disk fills or the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial-"


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text and fsync it; a reader sees the old file or the new one. Raises OSError."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to write in, which takes its place on leaving; on an error it goes.

    Raises OSError: it cannot be written; what was there before stays.
    """
    final = final.resolve()  # "." has no name
    partial = final.with_name(f"{PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a write that was cut short
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, final)
    except SafetensorError as error:  # its word for a full disk, too
        raise OSError(f"{final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, final: Path) -> None:
    """Give the folder `partial`, whose files are complete, its name; one of that name goes. Raises OSError."""
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    fsync(final.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

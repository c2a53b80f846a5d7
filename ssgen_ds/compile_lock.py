"""DeepSpeed's operators are compiled behind torch's lock file, which outlives a process that was killed meanwhile.

Every later start would wait for it without end. So while operators may be compiled, locks without a holder are removed.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

STALE_SECONDS = 180.0  # a process of another node may hold it: none compiles one operator for longer
_NAP = 5.0


@contextmanager
def without_stale_locks() -> Iterator[None]:
    """Inside, no lock of a dead process is waited for beyond `STALE_SECONDS`, and ninja is the environment's own."""
    _prefer_own_ninja()
    ended = threading.Event()

    def sweep() -> None:
        while True:
            remove_stale(build_root())
            if ended.wait(_NAP):
                return

    threading.Thread(target=sweep, name="ssgen-compile-locks", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _prefer_own_ninja() -> None:
    """An environment that is not activated has its ninja beside its Python only, and perhaps there is no other.

    Two versions that take turns would compile every operator anew: each distrusts the other's log.
    """
    scripts = sysconfig.get_path("scripts")
    found = os.environ.get("PATH", "")
    if found.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{found}"


def build_root() -> Path:
    """Where torch compiles; a folder for each operator, perhaps in one for this Python and device."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_stale(root: Path) -> None:
    """Remove the locks below `root` that are old and that no process of this host has open."""
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_SECONDS and not _is_open(lock):
                lock.unlink()
                log.warning("%s: removed; a process that was compiling there has been killed", lock)


def _is_open(file: Path) -> bool:
    name = str(file.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(descriptor) == name:
                return True
    return False

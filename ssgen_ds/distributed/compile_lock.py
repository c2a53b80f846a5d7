"""DeepSpeed's operators are compiled behind torch's lock file, which outlives a process that was killed meanwhile.

Every later start would wait for it without end. So while operators may be compiled, locks without a holder are removed.
The thread that does it imports nothing: the main thread imports DeepSpeed meanwhile, and one of the two would find
modules half made ("circular import", "dictionary changed size during iteration").
"""

from __future__ import annotations

import logging
import os
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.user_paths import cache_root

log = logging.getLogger(__name__)

STALE_SECONDS = 180.0  # a process of another node may hold it: none compiles one operator for longer
_NAP = 5.0
_OPERATORS = "torch_extensions"


@contextmanager
def without_stale_locks() -> Iterator[None]:
    """Inside, no lock of a dead process is waited for beyond `STALE_SECONDS`, and ninja is the environment's own.

    Where torch has no place to compile in, it gets one.
    """
    _prefer_own_ninja()
    _find_a_place()
    root, ended = build_root(), threading.Event()  # it imports torch's compiler, so it is asked for here

    def sweep() -> None:
        while True:
            remove_stale(root)
            if ended.wait(_NAP):
                return

    threading.Thread(target=sweep, name="ssgen-compile-locks", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _prefer_own_ninja() -> None:
    """An environment that is not activated has its ninja next to its Python only, and perhaps there is no other.

    Two versions that take turns would compile every operator again: each rejects the other's log.
    """
    scripts = sysconfig.get_path("scripts")
    found = os.environ.get("PATH", "")
    if found.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{found}"


def _find_a_place() -> None:
    """A container started with --user has no home folder that it may write to, and torch would give up there.

    Then operators are compiled in our cache, or in a folder for temporary files that is this user's own: whoever can
    write there could have other code run.
    """
    has_home = not os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~").startswith("~")
    if os.environ.get("TORCH_EXTENSIONS_DIR") or (has_home and _can_write(build_root())):
        return
    with suppress(UserError):  # no cache either
        place = cache_root() / _OPERATORS
        if _can_write(place):
            os.environ["TORCH_EXTENSIONS_DIR"] = str(place)
            return
    own = Path(tempfile.gettempdir()) / f"ssgen-ds-{os.getuid()}"
    with suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        status = own.lstat()  # a link of somebody else has write bits for all
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and _can_write(own / _OPERATORS):
            os.environ["TORCH_EXTENSIONS_DIR"] = str(own / _OPERATORS)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


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

"""Locks of compilers that were killed."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ssgen_ds import compile_lock
from ssgen_ds.compile_lock import STALE_SECONDS, build_root, remove_stale, without_stale_locks


def lock(root: Path, folder: str, age: float) -> Path:
    file = root / folder / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_old_ones_that_nobody_holds_are_removed(tmp_path):
    old = [lock(tmp_path, folder, STALE_SECONDS + 1) for folder in ("shm_comm", "py311_cpu/cpu_adam")]
    young = lock(tmp_path, "young", STALE_SECONDS - 60)
    held = lock(tmp_path, "held", STALE_SECONDS + 1)
    with held.open():
        remove_stale(tmp_path)
    assert [file.exists() for file in (*old, young, held)] == [False, False, True, True]
    remove_stale(tmp_path)
    assert not held.exists()
    remove_stale(tmp_path / "missing")


@pytest.mark.timeout(60)
def test_a_start_does_not_wait_for_a_dead_compiler(tmp_path, monkeypatch):
    """torch's own wait ends, though the lock becomes stale only while it waits."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compile_lock, "_NAP", 0.1)
    monkeypatch.setattr(compile_lock, "STALE_SECONDS", 1.0)
    left = lock(build_root(), "shm_comm", 0)
    waiter = threading.Thread(target=FileBaton(str(left)).wait, daemon=True)
    with without_stale_locks():
        waiter.start()
        waiter.join(20)
    assert not waiter.is_alive()


def test_ninja_is_that_of_this_environment(tmp_path, monkeypatch):
    """Whether the environment is activated or not: two versions that take turns compile everything anew."""
    other = tmp_path / "ninja"
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") == str(other)
    with without_stale_locks():
        assert Path(shutil.which("ninja")).parent == Path(sys.executable).parent

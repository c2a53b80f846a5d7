"""Locks of compilers that were killed."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ssgen_ds.distributed import compile_lock
from ssgen_ds.distributed.compile_lock import STALE_SECONDS, build_root, remove_stale, without_stale_locks


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


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """As in a container that was started with --user: no home folder to write to, no place named."""
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what is set in the test is taken back
    monkeypatch.setenv("SSGEN_CACHE", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_without_a_home_torch_compiles_in_the_cache(homeless, monkeypatch):
    monkeypatch.setenv("SSGEN_CACHE", str(homeless / "cache"))
    with without_stale_locks():
        assert build_root() == homeless / "cache" / "torch_extensions" and build_root().is_dir()


@pytest.mark.parametrize("home", ["/proc", "~"])
def test_without_a_cache_torch_compiles_in_a_folder_of_this_users_own(homeless, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(homeless)
    with without_stale_locks():
        assert build_root() == homeless / "tmp" / f"ssgen-ds-{os.getuid()}" / "torch_extensions"
        assert build_root().parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(homeless) == ["tmp"], "and in no folder named ~"


def test_torch_compiles_in_no_folder_that_others_may_write_to(homeless):
    """They could have code of theirs run."""
    folder = homeless / "tmp" / f"ssgen-ds-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with without_stale_locks():
        assert not os.environ["TORCH_EXTENSIONS_DIR"]
    folder.rmdir()
    folder.symlink_to(homeless)
    with without_stale_locks():
        assert not os.environ["TORCH_EXTENSIONS_DIR"]


def test_a_place_that_is_named_or_can_be_written_to_is_kept(homeless, monkeypatch):
    for variable, folder in (("HOME", "home/.cache/torch_extensions"), ("TORCH_EXTENSIONS_DIR", "named")):
        monkeypatch.setenv(variable, str(homeless / folder.split("/")[0]))
        with without_stale_locks():
            assert build_root() == homeless / folder

"""One job at a time writes a run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.run import lock as run_lock
from ssgen_ds.run import lock_owner
from ssgen_ds.run.layout import LOCK_FILE
from ssgen_ds.run.lock import RunLock
from ssgen_ds.run.lock_owner import Owner
from tests.support.launch import environment


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "HELD_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(run_lock, "_NAP", 0.02)


def write_lock(folder: Path, **content: object) -> None:
    folder.mkdir(exist_ok=True)
    owner = {"token": "t", "beat": 3, "host": "elsewhere", "pid": 1, "job": "", "since": "yesterday", **content}
    (folder / LOCK_FILE).write_text(json.dumps(owner))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_taken_and_given_back(tmp_path):
    lock = RunLock(tmp_path / "run").acquire()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "run").exists(), "nothing came into the folder"


def test_a_folder_with_something_in_it_stays(tmp_path):
    lock = RunLock(tmp_path / "run").acquire()
    (tmp_path / "run" / "recipe.yaml").touch()
    lock.release()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out():
    for folder in ("/proc/none", "/proc"):
        with pytest.raises(UserError, match=f"^output_dir: {folder} cannot be written to: .*; name another"):
            RunLock(Path(folder)).acquire()


def test_a_second_job_is_refused_by_the_name_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    lock = RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on .*, SLURM job 41, at "):
        RunLock(tmp_path).acquire()
    lock.release()
    RunLock(tmp_path).acquire().release()


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 60.0)
    write_lock(tmp_path, **{**asdict(Owner.me()), "pid": dead_process()})
    lock = RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == lock.token
    lock.release()


def test_a_lock_of_another_host_that_rests_is_taken_over(tmp_path):
    write_lock(tmp_path)
    RunLock(tmp_path).acquire().release()


def test_another_step_of_the_same_job_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    lock = RunLock(tmp_path).acquire()
    with pytest.raises(UserError, match="is being written by"):
        RunLock(tmp_path).acquire()
    lock.release()


def test_an_earlier_start_of_the_same_job_rests(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    write_lock(tmp_path, job="41")
    RunLock(tmp_path).acquire().release()


HOLDER = """
import sys, time
from pathlib import Path
from ssgen_ds.run.lock_owner import Owner
from ssgen_ds.run.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("has it", flush=True)
time.sleep(600)
"""


def holder(folder: Path, *prefix: str) -> subprocess.Popen[str]:
    """Another process that has taken the lock of `folder`."""
    command = [*prefix, sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    if process.stdout.readline() != "has it\n":
        process.wait()
        pytest.skip(f"cannot be started here: {prefix}")
    return process


@pytest.mark.parametrize("prefix", [(), ("unshare", "--pid", "--fork", "--mount-proc")])
def test_the_lock_of_a_live_process_holds_and_that_of_a_killed_one_is_taken_over_at_once(tmp_path, monkeypatch, prefix):
    """Also between containers: its process id means nothing here."""
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(run_lock, "HELD_PATIENCE_SECONDS", 60.0)
    process = holder(tmp_path, *prefix)
    try:
        with pytest.raises(UserError, match=r"is being written by process .* wait for it"):
            RunLock(tmp_path).acquire()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 60.0)
    began = time.monotonic()
    RunLock(tmp_path).acquire().release()
    assert time.monotonic() - began < 20


def test_where_the_kernel_says_that_a_resting_owner_lives_it_has_more_time(tmp_path, monkeypatch):
    """Its main thread may keep all others from running for a while."""
    monkeypatch.setattr(run_lock, "HELD_PATIENCE_SECONDS", 60.0)
    lock = RunLock(tmp_path).acquire()
    lock._ended.set()  # its heart rests
    lock._thread.join()
    waiter = ThreadPoolExecutor(1)
    taken = waiter.submit(RunLock(tmp_path).acquire)
    time.sleep(2.5)  # more than the patience without the kernel's word
    assert not taken.done()
    lock._write(1)
    with pytest.raises(UserError, match="is being written by"):
        taken.result(20)
    lock.release()


def test_a_suspended_owner_loses_it_in_the_end(tmp_path):
    process = holder(tmp_path)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        RunLock(tmp_path).acquire().release()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe\0", b"[1]", b'{"token": "t"}', b'{"token": 1, "beat": [], "host": 0}']
)
def test_a_lock_of_another_shape_is_nobodys(tmp_path, data):
    (tmp_path / LOCK_FILE).write_bytes(data)
    assert isinstance(run_lock.owner_of(tmp_path), str)
    RunLock(tmp_path).acquire().release()


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match="LOCK is a folder"):
        RunLock(tmp_path).acquire()


def test_a_child_does_not_keep_the_lock(tmp_path):
    """Of a killed process a forked worker may live on."""
    lock = RunLock(tmp_path).acquire()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.close(lock._descriptor)
    try:
        deadline = time.monotonic() + 20  # for the child to come so far
        while lock_owner.is_held(tmp_path / LOCK_FILE) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not lock_owner.is_held(tmp_path / LOCK_FILE)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lock._descriptor = None
        lock.release()


def test_a_lock_cut_short_while_it_was_written(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"token": "t", "be')
    RunLock(tmp_path).acquire().release()


def test_a_lock_that_was_taken_over_stays(tmp_path):
    lock = RunLock(tmp_path).acquire()
    lock._ended.set()  # its heart stops, as on a node that hangs
    write_lock(tmp_path, token="another's")
    lock.release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "another's"


@pytest.mark.parametrize("how", [{}, {**asdict(Owner.me()), "pid": 2**22 + 1}])
def test_of_several_that_find_a_dead_lock_one_gets_it(tmp_path, how):
    write_lock(tmp_path, **how)

    def take(_: int) -> RunLock | None:
        try:
            return RunLock(tmp_path).acquire()
        except UserError:
            return None

    with ThreadPoolExecutor(3) as pool:
        locks = [lock for lock in pool.map(take, range(3)) if lock is not None]
    for lock in locks:  # one that is held ends this process when its folder goes
        lock.release()
    assert len(locks) == 1


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        RunLock(tmp_path / "run").acquire()


def test_an_owner_that_stood_still_ends_and_leaves_the_lock_to_its_successor(tmp_path):
    told = []
    lock = RunLock(tmp_path, told.append).acquire()
    write_lock(tmp_path, token="successor", pid=77, job="42")
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "was taken over by another job" in told[0] and "it is process 77 on elsewhere, SLURM job 42" in told[0]
    time.sleep(0.5)
    assert len(told) == 1 and json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "successor"
    lock.release()
    assert (tmp_path / LOCK_FILE).exists()


def test_an_owner_whose_successor_has_ended_ends_too(tmp_path):
    told = []
    lock = RunLock(tmp_path, told.append).acquire()
    (tmp_path / LOCK_FILE).unlink()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "has ended since" in told[0] and not (tmp_path / LOCK_FILE).exists()
    lock.release()

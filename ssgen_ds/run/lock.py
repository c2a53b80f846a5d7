"""One job at a time writes a run folder.

The lock is a file with its owner and a counter that the owner raises every few seconds. Whoever finds it watches the
counter: it moves, so the owner is alive and named; it rests, so the owner was killed and the lock is taken over. An
owner that merely stood still (a suspended job) sees that as soon as it goes on, and ends.
Comparing contents needs no clock that two nodes agree on. Where the file system has them the owner also holds a lock of
the kernel: free, it says at once that the owner was killed; held, that the owner lives although its counter rests for a
while. It is never the only word: network file systems lack such locks, or keep them to one node.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssgen_ds.errors import EXIT_FAILURE, UserError
from ssgen_ds.run.layout import LOCK_FILE
from ssgen_ds.run.lock_owner import Content, Owner, is_held, read, take_kernel_lock

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World

log = logging.getLogger(__name__)

BEAT_SECONDS = 3.0
PATIENCE_SECONDS = 4 * BEAT_SECONDS  # without a beat; then the owner is dead
HELD_PATIENCE_SECONDS = 60.0  # where the kernel says that it lives; then it is suspended, or its node is lost
SHARED_SECONDS = 10.0  # a network file system may show a new file this late
_NAP = 0.2


def _end_at_once(text: str) -> None:
    """Wait for nobody, not even to tell the other ranks: anything written meanwhile would go into another job's run."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILURE)


def cannot_write(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"output_dir: {run_dir} cannot be written to: {error.strerror or error}; name another, on a disk with room on "
        "which you may write"
    )


@dataclass
class RunLock:
    """Held by rank 0 from before the first look into the folder until the end.

    Args:
        run_dir: created when it does not exist, and removed again when nothing else came into it.
        lost: called with a message, in a thread of the lock, when another job has taken it over; by default this
            process ends.
    """

    run_dir: Path
    lost: Callable[[str], None] = _end_at_once
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _owner: Owner = field(default_factory=Owner.me, init=False)
    _descriptor: int | None = field(default=None, init=False)  # of the file while it is ours
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _created: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    @property
    def file(self) -> Path:
        return self.run_dir / LOCK_FILE

    def acquire(self) -> RunLock:
        """Take the lock. Raises UserError naming the owner when that is alive, or the folder where it cannot write."""
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise UserError(f"output_dir: {self.run_dir} is a file")
        self._created = not self.run_dir.exists()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._wait_for_death()
        except OSError as error:
            raise cannot_write(self.run_dir, error) from None
        self._thread = threading.Thread(target=self._beat, name="ssgen-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Give it back; a lock that somebody has taken over stays theirs."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        found = read(self.file)
        if found is not None and found.token == self.token:
            self.file.unlink(missing_ok=True)
        if self._thread is None or not self._thread.is_alive():  # one that hangs may still write to the descriptor
            self._close()
        if self._created and self.run_dir.is_dir() and not any(self.run_dir.iterdir()):
            self.run_dir.rmdir()

    def _create(self) -> bool:
        """Whether the file was not there: O_EXCL is atomic, on NFS as well since version 3."""
        try:
            self._descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return False
        os.register_at_fork(after_in_child=self._close)  # a child that lives longer must not hold the lock
        try:
            device = os.fstat(self._descriptor).st_dev
            self._owner = replace(self._owner, has_kernel_lock=take_kernel_lock(self._descriptor), device=device)
            self._write(0)
        except OSError:  # a full disk: nothing empty is left behind
            self._close()
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, beat: int) -> None:
        """Over the last one, in the same file: the kernel's lock is on the file, not on its name."""
        if self._descriptor is not None:
            os.pwrite(self._descriptor, Content(self.token, beat, self._owner).to_bytes(), 0)
            os.fsync(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if not self._is_mine():
                    return
                self._write(beat)
            except OSError:
                continue  # a full disk or a network file system that is away: the run itself will meet it

    def _is_mine(self) -> bool:
        """Whether this job still has the lock. Without it somebody took it over while this job stood still."""
        found = read(self.file)
        if found is not None and found.token == self.token:
            return True
        if not self._ended.is_set():
            now = "has ended since, or its lock was removed" if found is None else f"is {found.owner}"
            self.lost(
                f"output_dir: {self.run_dir} was taken over by another job, for this one had stood still; it {now}. "
                "This one ends here"
            )
        return False

    def _wait_for_death(self) -> None:
        """Returns when the lock's owner is dead and the file is out of the way."""
        first = read(self.file)
        began = time.monotonic()
        while first is not None and not first.owner.is_surely_dead(self.file):
            resting = time.monotonic() - began
            if resting > HELD_PATIENCE_SECONDS or (resting > PATIENCE_SECONDS and not is_held(self.file)):
                break
            now = read(self.file)
            if now is None:
                return
            if (now.token, now.beat) != (first.token, first.beat):
                raise UserError(
                    f"output_dir: {self.run_dir} is being written by {now.owner}; "
                    "wait for it, stop it, or name another output_dir"
                )
            time.sleep(_NAP)
        if first is not None:
            log.info("%s: its last owner, %s, has gone", self.run_dir, first.owner)
            self._bury(first.token)

    def _bury(self, token: str) -> None:
        """Remove the lock with this token and no other: of several that found it dead, the one with the claim does.

        Without the claim, a slow one could remove the lock that a quick one has taken meanwhile.
        """
        claim = self.file.with_name(f".{LOCK_FILE}-claim-{hashlib.sha256(token.encode()).hexdigest()[:16]}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while claim.exists() and time.monotonic() < deadline:
                time.sleep(_NAP)
            if time.monotonic() >= deadline:
                claim.unlink(missing_ok=True)  # whoever made it died within the next two lines
            return
        found = read(self.file)
        if found is not None and found.token == token:
            self.file.unlink()
        claim.unlink(missing_ok=True)


def owner_of(run_dir: Path) -> str | None:
    """The token of the job that has this folder; None when nobody has."""
    found = read(run_dir / LOCK_FILE)
    return None if found is None else found.token


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Inside, the ranks of `world` alone write this folder, and all of them see it.

    Raises UserError on every rank when another job writes it, or when some rank sees another folder by this name.
    """
    lock = RunLock(run_dir)
    world.together(lambda: lock.acquire() if world.is_main else None)
    try:
        owner = world.broadcast((lock.token, socket.gethostname()))
        world.together(lambda: _check_shared(run_dir, *owner, world.rank))
        yield
    finally:
        if world.is_main:
            lock.release()


def _check_shared(run_dir: Path, token: str, main_host: str, rank: int) -> None:
    deadline = time.monotonic() + SHARED_SECONDS
    while owner_of(run_dir) != token:
        if time.monotonic() > deadline:
            raise UserError(
                f"output_dir: rank {rank} on {socket.gethostname()} does not see in {run_dir.absolute()} what rank 0 "
                f"on {main_host} wrote there; put it on a file system that all nodes share, by its full path"
            )
        time.sleep(_NAP)

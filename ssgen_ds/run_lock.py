"""One job at a time writes a run folder.

The lock is a file with its owner and a counter that the owner raises every few seconds. Whoever finds it watches the
counter: it moves, so the owner is alive and named; it rests, so the owner was killed and the lock is taken over. An
owner that merely stood still (a suspended job) sees that as soon as it goes on, and ends.
Comparing contents needs no clock that two nodes agree on, and no file locks, which network file systems lack or fake.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import EXIT_FAILURE, UserError

if TYPE_CHECKING:
    from ssgen_ds.distributed import World

LOCK_FILE = "LOCK"
LOCK_REMNANTS = f".{LOCK_FILE}-*"  # beats and claims on their way
BEAT_SECONDS = 3.0
PATIENCE_SECONDS = 4 * BEAT_SECONDS  # without a beat; then the owner is dead
SHARED_SECONDS = 10.0  # a network file system may show a new file this late
_NAP = 0.2


def _end_at_once(text: str) -> None:
    """Wait for nobody, not even to tell the other ranks: whatever is written meanwhile goes into another job's run."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILURE)


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
    _owner: _Owner = field(default_factory=lambda: _Owner.me(), init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _created: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    @property
    def file(self) -> Path:
        return self.run_dir / LOCK_FILE

    def acquire(self) -> RunLock:
        """Take the lock. Raises UserError naming the owner when that is alive."""
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise UserError(f"output_dir: {self.run_dir} is a file")
        self._created = not self.run_dir.exists()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._wait_for_death()
        self._thread = threading.Thread(target=self._beat, name="ssgen-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Give it back; a lock that somebody has taken over stays theirs."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)  # a beat on its way would bring the file back
        owner = _read(self.file)
        if owner is not None and owner["token"] == self.token:
            self.file.unlink(missing_ok=True)
        if self._created and self.run_dir.is_dir() and not any(self.run_dir.iterdir()):
            self.run_dir.rmdir()

    def _create(self) -> bool:
        """Whether the file was not there: O_EXCL is atomic, on NFS as well since version 3."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._content(0)))
        return True

    def _content(self, beat: int) -> dict[str, Any]:
        return {"token": self.token, "beat": beat, **asdict(self._owner)}

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            partial = self.file.with_name(f".{LOCK_FILE}-{self.token}")
            try:
                if not self._is_mine():
                    return
                partial.write_text(json.dumps(self._content(beat)), encoding="utf-8")
                if self._ended.is_set():
                    partial.unlink()
                else:
                    os.replace(partial, self.file)
            except OSError:
                continue  # a full disk or a network file system that is away: the run itself will meet it

    def _is_mine(self) -> bool:
        """Whether this job still has the lock. Without it somebody took it over while this job stood still."""
        found = _read(self.file)
        if found is not None and found["token"] == self.token:
            return True
        if not self._ended.is_set():
            now = "has ended since, or its lock was removed" if found is None else f"is {_Owner.of(found)}"
            self.lost(
                f"output_dir: {self.run_dir} was taken over by another job, for this one had stood still; it {now}. "
                "This one ends here"
            )
        return False

    def _wait_for_death(self) -> None:
        """Returns when the lock's owner is dead and the file is out of the way."""
        first = _read(self.file)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while first is not None and not _Owner.of(first).is_surely_dead() and time.monotonic() < deadline:
            now = _read(self.file)
            if now is None:
                return
            if (now["token"], now["beat"]) != (first["token"], first["beat"]):
                raise UserError(
                    f"output_dir: {self.run_dir} is being written by {_Owner.of(now)}; "
                    "wait for it, stop it, or name another output_dir"
                )
            time.sleep(_NAP)
        if first is not None:
            self._bury(first["token"])

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
        if (_read(self.file) or {"token": ""})["token"] == token:
            self.file.unlink()
        claim.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Owner:
    host: str
    pid: int
    job: str  # SLURM's id; "" outside
    since: str

    @classmethod
    def me(cls) -> _Owner:
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(socket.gethostname(), os.getpid(), job, time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Owner:
        return cls(*(content[name] for name in cls.__dataclass_fields__))

    def is_surely_dead(self) -> bool:
        """A process of this host that has gone, or an earlier run of this very SLURM job, which starts again alone."""
        if self.job and self.job == os.environ.get("SLURM_JOB_ID"):
            return (self.host, self.pid) != (socket.gethostname(), os.getpid())
        return self.host == socket.gethostname() and not _process_exists(self.pid)

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, at {self.since}"


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The lock's content; None when there is none. One that cannot be read was being written when its owner died."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return {"token": text, "beat": -1, "host": "an unknown host", "pid": -1, "job": "", "since": "an unknown time"}


def owner_of(run_dir: Path) -> str | None:
    """The token of the job that has this folder; None when nobody has."""
    found = _read(run_dir / LOCK_FILE)
    return None if found is None else found["token"]


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
    while (_read(run_dir / LOCK_FILE) or {"token": ""})["token"] != token:
        if time.monotonic() > deadline:
            raise UserError(
                f"output_dir: rank {rank} on {socket.gethostname()} does not see in {run_dir.absolute()} what rank 0 "
                f"on {main_host} wrote there; put it on a file system that all nodes share, by its full path"
            )
        time.sleep(_NAP)

"""Who holds the lock of a run folder, and whether that process is dead: by the file's content and by the kernel.

Host names and process ids alone prove nothing. Containers on one machine share the host name or repeat process ids,
and the steps of one SLURM job share both the job and the machine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ssgen_ds.errors import UserError

_SIZE = 1024  # bytes of the file, padded: each beat is written over the last in place
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)  # no locks here
_RETRIES, _RETRY_SECONDS = 20, 0.05


@dataclass(frozen=True)
class Owner:
    """A process as others on its machine recognise it. Fields that an older version did not write are empty."""

    host: str
    pid: int
    job: str  # the SLURM job's id; "" outside SLURM
    since: str
    boot: str = ""  # id of the machine's last boot: the same in all its containers
    pids: str = ""  # the process namespace of `pid`
    device: int = -1  # device of the file: two mounts of one network file system may not share the kernel's locks
    has_kernel_lock: bool = False

    @classmethod
    def me(cls) -> Owner:
        job, since = os.environ.get("SLURM_JOB_ID", ""), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), job, since, _boot(), _pids())

    def is_surely_dead(self, file: Path) -> bool:
        """Whether the kernel of this machine knows it: the lock is free again, or the namespace has no such process."""
        if not self.boot or self.boot != _boot():
            return False
        if self.has_kernel_lock and self.device == _device(file) and not is_held(file):
            return True
        return bool(self.pids) and self.pids == _pids() and not _process_exists(self.pid)

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, at {self.since}"


_NOBODY = Owner("an unknown host", -1, "", "an unknown time")


@dataclass(frozen=True)
class Content:
    """What the file holds: who has the lock, and the number of beats."""

    token: str
    beat: int
    owner: Owner

    def to_bytes(self) -> bytes:
        """The size is always the same, so that a reader never sees the end of an older content."""
        text = json.dumps({"token": self.token, "beat": self.beat, **asdict(self.owner)})
        return text.ljust(_SIZE - 1).encode() + b"\n"


def read(file: Path) -> Content | None:
    """The content; None without a lock. An unreadable lock belongs to nobody: its owner may have died while writing."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise UserError(f"output_dir: {file} is a folder, where the lock of the run is kept; remove it") from None
    try:
        values = json.loads(data)
        known = {field.name: values[field.name] for field in fields(Owner) if field.name in values}
        content = Content(values["token"], values["beat"], Owner(**known))
        if isinstance(content.token, str) and isinstance(content.beat, int) and isinstance(content.owner.pid, int):
            return content
    except (ValueError, TypeError, KeyError):
        pass
    return Content(f"unreadable {hashlib.sha256(data).hexdigest()}", -1, _NOBODY)


def take_kernel_lock(descriptor: int) -> bool:
    """Hold the kernel's lock on this open file until it is closed; False where the file system has none."""
    for _ in range(_RETRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # somebody is checking whether it is held
            time.sleep(_RETRY_SECONDS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    return False


def is_held(file: Path) -> bool:
    """Whether a live process holds the kernel's lock; False also where the file system has none."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _device(file: Path) -> int:
    try:
        return file.stat().st_dev
    except OSError:
        return -1


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pids() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

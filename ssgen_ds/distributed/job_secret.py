"""What only the ranks of a job know: SSGEN_JOB_SECRET from their launcher's environment, else a file of the user's own.

The file is made by whichever rank comes first, in the cache (`SSGEN_CACHE`, else ~/.cache/ssgen-ds), which the nodes of
most clusters share; where there is none to write in, in the folder for temporary files. Its mode is 600.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.user_paths import cache_root

SECRET_VARIABLE = "SSGEN_JOB_SECRET"
SECRET_FILE = f"job-secret-{os.getuid()}"  # users may share a cache
_SHORTEST = 16  # characters
_LENGTH = 64
_WAIT_SECONDS = 5.0  # for another rank that has made the file to fill it


def job_secret() -> bytes:
    """32 bytes, the same on all ranks of this user, or of this job where its launcher says so. Raises UserError."""
    given = os.environ.get(SECRET_VARIABLE, "")
    if given:
        if len(given) < _SHORTEST:
            raise UserError(f"{SECRET_VARIABLE}: must have {_SHORTEST} characters or more; `openssl rand -hex 32`")
        return hashlib.sha256(given.encode()).digest()
    problems = []
    for folder in _folders():
        try:
            return hashlib.sha256(_kept_in(folder).encode()).digest()
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise UserError.from_list(
        "there is no place of your own to keep the secret by which the ranks know each other; set "
        f"{SECRET_VARIABLE} to the same random text for all ranks, or SSGEN_CACHE to a folder of your own",
        problems,
    )


def _folders() -> list[Path]:
    folders = [Path(tempfile.gettempdir()) / f"ssgen-ds-{os.getuid()}"]
    with suppress(UserError):  # no home
        folders.insert(0, cache_root())
    return folders


def _kept_in(folder: Path) -> str:
    """Raises OSError: it cannot be kept there, or others could read it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SECRET_FILE
    if not file.exists():
        _make(file)
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, encoding="ascii", errors="replace") as stream:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(0, f"{SECRET_FILE} there is not yours alone (mode 600)")
        deadline = time.monotonic() + _WAIT_SECONDS
        while len(text := stream.read()) < _LENGTH and time.monotonic() < deadline:
            time.sleep(0.05)
            stream.seek(0)
    if len(text) < _LENGTH:
        raise OSError(0, f"{SECRET_FILE} there was cut short; remove it")
    return text


def _make(file: Path) -> None:
    """Whole or not at all: of several ranks that make it, one does, and the others read that one's."""
    partial = file.with_name(f".{SECRET_FILE}-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(_LENGTH // 2))
            stream.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)

"""Conversions that are made once, into the cache, and found by every later run.

GGUF files, and checkpoints whose tensors transformers renames, fuses or stacks while loading. Converting holds the
whole model once, in a process of its own that gives its memory back; loading under ZeRO-3 then never does.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ssgen_ds.data.paths import new_folder
from ssgen_ds.errors import EXIT_USER_ERROR, UserError
from ssgen_ds.recipe.user_paths import cache_root
from ssgen_ds.run.files import set_modes

logger = logging.getLogger(__name__)

SHARD_SIZE = "200MB"  # small shards: a reader maps one at a time
WRITER = 2  # version of the cached files; older ones did not refuse checkpoints that lack tensors
_ERROR_MARK = "conversion refused: "


def convert_once(folder: Path, what: str, function: str, *arguments: str) -> bool:
    """Fill `folder` by `function(*arguments, temporary folder)` unless it is there; whether this call did it.

    Safe to call from any number of processes: one converts under a file lock, the others wait for it and then find the
    folder. When the converter dies the kernel drops its lock and the next one tries, so each process either finds the
    folder or raises the error itself; none waits for a process that is gone.

    Args:
        folder: appears only when it is complete.
        what: what is converted, for messages.
        function: `module:name`, called in a process of its own: in a process group transformers saves on rank 0 only,
            and another rank may have got the lock.

    Raises:
        UserError: the function refuses its input, or the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{folder.name}.lock"):
            if folder.is_dir():
                return False
            logger.info("%s: converting once (about half a minute per 100 MB)", what)
            _run_child(what, function, str(folder), *arguments)
            return True
    except OSError as error:
        raise UserError(f"model.path: cannot convert {what} into {folder}: {error}; set SSGEN_CACHE") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file drops the lock


def _run_child(what: str, *arguments: str) -> None:
    call = "import sys; from ssgen_ds.modeling.convert import _child; _child(*sys.argv[1:])"
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", call, *arguments], stderr=subprocess.PIPE, text=True, env=alone)
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(done.stderr.strip().rpartition(_ERROR_MARK)[2])
    if done.returncode:
        raise RuntimeError(f"converting {what} failed:\n{done.stderr}")


def _child(function: str, folder: str, *arguments: str) -> None:
    """Convert into a temporary sibling, then rename."""
    final = Path(folder)
    temporary = new_folder(final.parent, f".{final.name}-")
    module, _, name = function.partition(":")
    try:
        getattr(import_module(module), name)(*arguments, temporary)
        set_modes(temporary)
        temporary.rename(final)
    except UserError as error:
        sys.stderr.write(f"{_ERROR_MARK}{error}")
        sys.exit(EXIT_USER_ERROR)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_checkpoint(path: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Folder with the checkpoint's tensors under the names and in the shapes that the model itself uses.

    Raises:
        UserError: the cache cannot be written.
    """
    import transformers

    stamp = f"{path}\n{revision}\n{transformers.__version__}\n{WRITER}\n"
    if Path(path).is_dir():
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(path).iterdir())]
        stamp = f"{Path(path).resolve()}\n{stats}\n{transformers.__version__}\n{WRITER}\n"
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    folder = cache_root() / f"{Path(path).name}-{digest}"
    arguments = (path, revision or "", str(int(trust_remote_code)))
    if convert_once(folder, path, f"{__name__}:write_checkpoint", *arguments):
        logger.info("%s: rewritten as the model names its tensors, to %s", path, folder)
    return folder


def write_checkpoint(path: str, revision: str, trust_remote_code: str, folder: Path) -> None:
    """Load by transformers in the stored dtype and save without turning its conversions back."""
    from ssgen_ds.modeling.fit import load_fitting

    try:
        model = load_fitting(
            path, path, revision=revision or None, trust_remote_code=trust_remote_code == "1", dtype="auto"
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path: cannot load {path}: {error}") from error
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE, save_original_format=False)

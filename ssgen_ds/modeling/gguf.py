"""GGUF files: converted once into a Hugging Face folder with float32 weights, which every later run loads."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssgen_ds.errors import EXIT_USER_ERROR, UserError

logger = logging.getLogger(__name__)

SHARD_SIZE = "200MB"  # small shards: a reader maps one at a time
_SAMPLE_BYTES = 1 << 20
_ERROR_MARK = "conversion refused: "


def cache_root() -> Path:
    """Where converted models are kept: $SSGEN_CACHE, else ~/.cache/ssgen-ds."""
    return Path(os.environ.get("SSGEN_CACHE") or Path.home() / ".cache" / "ssgen-ds")


def convert_gguf(file: Path) -> Path:
    """Folder with the file's weights (float32), configuration and tokenizer, converted on the first call.

    Safe to call from any number of processes: one converts under a file lock, the others wait for it and then find the
    folder. When the converter dies the kernel drops its lock and the next one tries, so each process either returns
    the folder or raises the error itself; none waits for a process that is gone.

    Raises:
        UserError: the file is no GGUF, its architecture is unknown to transformers, or the cache cannot be written.
    """
    if not file.is_file():
        raise UserError(f"model.path: {file}: no such file")
    folder = cache_root() / f"{file.stem}-{_fingerprint(file)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():
                _convert_in_child(file, folder)
    except OSError as error:
        raise UserError(f"model.path: cannot convert {file} into {folder}: {error}; set SSGEN_CACHE") from error
    return folder


def _fingerprint(file: Path) -> str:
    """Hash of what decides the converted folder, without reading gigabytes: name, size, both ends, converter."""
    import transformers

    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name}\n{size}\n{transformers.__version__}\n".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file drops the lock


def _convert_in_child(file: Path, folder: Path) -> None:
    """Run `_convert_into` in a process of its own and pass its error on.

    In a process group transformers saves on rank 0 only, and whoever got the lock may be another rank. The memory that
    conversion takes, several times the model, is given back, too.
    """
    stored = _stored_type(file)
    logger.info("%s: converting once (about half a minute per 100 MB)", file.name)
    call = "import sys; from ssgen_ds.modeling.gguf import _child; _child(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", call, str(file), str(folder)], stderr=subprocess.PIPE, text=True)
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(done.stderr.strip().rpartition(_ERROR_MARK)[2])
    if done.returncode:
        raise RuntimeError(f"converting {file} failed:\n{done.stderr}")
    size = sum(part.stat().st_size for part in folder.glob("*.safetensors")) / 2**20
    logger.info("%s: %s weights written as float32 (%.0f MiB) to %s", file.name, stored, size, folder)


def _child(file: str, folder: str) -> None:
    try:
        _convert_into(Path(file), Path(folder))
    except UserError as error:
        sys.stderr.write(f"{_ERROR_MARK}{error}")
        sys.exit(EXIT_USER_ERROR)


def _convert_into(file: Path, folder: Path) -> None:
    """Convert into a temporary sibling, then rename: `folder` exists only when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UserError(f"model.path: transformers cannot read {file}: {error}") from error
        # The file's free-text title would otherwise pass for the place that the model came from.
        model.config._name_or_path = file.name
        model.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stored_type(file: Path) -> str:
    """How most of the file's weights are stored: `dequantised Q4_1`, or `F16`.

    Raises:
        UserError: not a GGUF file.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"model.path: {file} is not a GGUF file: {error}") from error
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    name = elements.most_common(1)[0][0]
    return name if name in ("F32", "F16", "BF16") else f"dequantised {name}"

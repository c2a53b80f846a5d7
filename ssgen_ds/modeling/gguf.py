"""GGUF files: converted once into a Hugging Face folder with float32 weights, which every later run loads."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.convert import SHARD_SIZE, WRITER, convert_once
from ssgen_ds.modeling.fit import load_fitting
from ssgen_ds.recipe.user_paths import cache_root

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20


def convert_gguf(file: Path) -> Path:
    """Folder with the file's weights (float32), configuration and tokenizer, converted on the first call.

    Later calls do not parse the file: that takes seconds, as its tokenizer is read entry by entry in Python.

    Raises:
        UserError: the file is no GGUF, its architecture is unknown to transformers, or the cache cannot be written.
    """
    if not file.is_file():
        raise UserError(f"model.path: {file}: no such file")
    folder = cache_root() / f"{file.stem}-{_fingerprint(file)}"
    if folder.is_dir():
        return folder
    stored = _stored_type(file)
    if convert_once(folder, file.name, f"{__name__}:write_gguf", str(file)):
        size = sum(part.stat().st_size for part in folder.glob("*.safetensors")) / 2**20
        logger.info("%s: %s weights written as float32 (%.0f MiB) to %s", file.name, stored, size, folder)
    return folder


def _fingerprint(file: Path) -> str:
    """Hash of what decides the converted folder, without reading gigabytes: name, size, both ends, converter."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name}\n{size}\n{version('transformers')}\n{WRITER}\n".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def write_gguf(path: str, folder: Path) -> None:
    """Dequantise the file's weights and write them with configuration and tokenizer."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    file = Path(path)
    try:
        model = load_fitting(
            str(file.parent),
            str(file),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"model.path: transformers cannot read {file}: {error}") from error
    # The file's free-text title would otherwise pass for the place that the model came from.
    model.config._name_or_path = file.name
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


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

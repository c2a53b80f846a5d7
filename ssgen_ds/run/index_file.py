"""The index of a checkpoint with several files. It comes with a download, so its content is not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePath

from ssgen_ds.errors import UserError

WEIGHT_INDEX = "model.safetensors.index.json"
_INDICES = (WEIGHT_INDEX, "pytorch_model.bin.index.json")


def shard_names(index: Path) -> list[str]:
    """The files of a checkpoint, relative to its folder. Raises UserError: it is damaged, or names a file elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged: {type(error).__name__}: {error}; fetch the model again") from None
    if outside := leaving(names):
        raise UserError(
            f"{index}: names {outside[0]!r}, which is no file of the model's folder; do not use this model unless you "
            "know why"
        )
    return names


def leaving(names: Iterable[object]) -> list[str]:
    """The names that do not stay inside the folder: absolute ones, and ones with `..`."""
    return [
        str(name)
        for name in names
        if not isinstance(name, str) or not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts
    ]


def refuse_foreign_files(path: str, revision: str | None) -> None:
    """Check the indices of a folder or hub id before a library reads the files that they name. Raises UserError."""
    from transformers.utils import cached_file

    for name in _INDICES:
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shard_names(Path(found))

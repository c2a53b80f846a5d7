"""Where the model of a recipe lies: a hub id, a folder, a GGUF file, or a file inside an installed package.

Imports no torch, so that a model which is not there is found in a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssgen_ds.data.paths import without_package
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import read_adapter_config, refuse_damaged_adapter
from ssgen_ds.modeling.gguf import convert_gguf


@dataclass(frozen=True)
class ModelPath:
    """Where transformers finds the model: `path` is a folder or a hub id."""

    path: str
    revision: str | None = None


def find_local_model(path: str) -> Path | None:
    """The model's folder or GGUF file; None for a hub id, which only the hub can say more about.

    Raises:
        UserError: no such file or folder, or a folder that is no model (the message says what it is).
    """
    original = path
    path = without_package(path, "model.path")
    place = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not place.is_file():
            raise UserError(f"model.path: {place}: no such file")
        return place
    if place.is_dir():
        if (place / "config.json").is_file():
            return place
        if (place / "adapter_config.json").is_file():
            raise UserError(f"model.path: {original} is an adapter: name its base here, and it in model.adapter_path")
        raise UserError(f"model.path: {original} is no model folder: it has no config.json")
    if place.is_absolute() or path.startswith(("./", "../", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: {original}: no such file or folder")
    return None


def resolve_model_path(path: str, revision: str | None = None) -> ModelPath:
    """Hub id, folder, `*.gguf` file or `package:MODULE/file` -> what transformers loads. GGUF files are converted once.

    Raises:
        UserError: as `find_local_model` does, or a GGUF file that cannot be converted.
    """
    place = find_local_model(path)
    if place is None:
        return ModelPath(path, revision)
    return ModelPath(str(convert_gguf(place) if place.is_file() else place))


def split_adapter(path: str) -> tuple[str, str | None]:
    """(base model, adapter folder) of an adapter folder; (path, None) of anything else.

    Raises:
        UserError: an adapter that does not name its base, or is damaged.
    """
    if not (Path(path) / "adapter_config.json").is_file() or (Path(path) / "config.json").is_file():
        return path, None
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: adapter_config.json names no base_model_name_or_path")
    refuse_damaged_adapter(path)
    return base, path

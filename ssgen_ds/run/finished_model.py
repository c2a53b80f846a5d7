"""Check that the model of a finished run is complete, by names and sizes of files, which is cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.run.index_file import WEIGHT_INDEX, shard_names
from ssgen_ds.run.layout import FINISHED_FILE, MODEL_FOLDER

_SIZE_BYTES = 8  # at the beginning of a safetensors file: the length of its header


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file that the model needs, by its path in the folder. People may edit the model card."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".md"]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def model_problems(run_dir: Path) -> list[str]:
    """What the model of a finished run lacks, one sentence for each problem."""
    folder = run_dir / MODEL_FOLDER
    if not folder.is_dir():
        return [f"{folder}: missing"]
    recorded = _recorded(run_dir / FINISHED_FILE)
    if recorded is None:  # a run of an earlier version
        return _problems_by_content(folder)
    found = sizes(folder)
    return [
        f"{folder / name}: missing" if name not in found else f"{folder / name}: {found[name]} bytes instead of {size}"
        for name, size in recorded.items()
        if found.get(name) != size and not name.endswith(".md")
    ]


def _recorded(file: Path) -> dict[str, int] | None:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    recorded = content.get(MODEL_FOLDER) if isinstance(content, dict) else None
    return recorded if isinstance(recorded, dict) and recorded else None


def _problems_by_content(folder: Path) -> list[str]:
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return [f"{folder}: no model in it"]
    weights = {file.name for file in folder.glob("*.safetensors")}
    index = folder / WEIGHT_INDEX
    if index.is_file():
        try:
            weights |= set(shard_names(index))
        except UserError as problem:
            return [str(problem)]
    if not weights:
        return [f"{folder}: no weights in it"]
    return [what for name in sorted(weights) if (what := problem_of_weights(folder / name))]


def problem_of_weights(file: Path) -> str:
    """What is wrong with a safetensors file, by the length that its header gives; "" when nothing is."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_SIZE_BYTES), "little")
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return f"{file}: missing"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"{file}: damaged"
    wanted, size = _SIZE_BYTES + length + max(ends, default=0), file.stat().st_size
    return "" if size == wanted else f"{file}: {size} bytes instead of {wanted}"

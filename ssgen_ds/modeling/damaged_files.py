"""Finds the damaged file of a model folder and names it, where the libraries only say what failed.

transformers and peft read these files themselves, so that nothing in them is forgiven, not even NUL bytes at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.run.finished_model import problem_of_weights
from ssgen_ds.run.index_file import WEIGHT_INDEX, shard_names

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", ADAPTER_CONFIG,
)  # fmt: skip
FIX = "fetch or copy it again"


def read_json(file: Path) -> dict[str, Any]:
    """An object of a model folder. Raises UserError naming the file when it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {' '.join(str(error).split())}; {FIX}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged: expected an object, got {type(content).__name__}; {FIX}")
    return content


def damaged_json(folder: Path) -> list[str]:
    """A sentence for each small file that cannot be read; none for what is no folder here."""
    problems = []
    for file in (folder / name for name in _SMALL):
        try:
            if file.is_file():
                read_json(file)
        except UserError as problem:
            problems.append(str(problem))
    return problems


def damaged_weights(folder: Path) -> list[str]:
    """A sentence for each weight file that would be loaded and is not as long as its header says; reads headers alone.

    Raises UserError: the index of the weights is damaged.
    """
    index = folder / WEIGHT_INDEX
    names = shard_names(index) if index.is_file() else ["model.safetensors", ADAPTER_WEIGHTS]
    files = [file for file in (folder / name for name in names) if index.is_file() or file.is_file()]
    return [f"{problem}; {FIX}" for file in files if (problem := problem_of_weights(file))]

"""Names of results in a run folder: the data, the step of the weights, and the settings where they fit in a name.

    test-step200.json                              the default settings
    test-step200-correct1-tokens64-temp0.7.json    others
    gsm8k-test-step200.json                        a file of the same name in another folder
    test-step200-3fa2c1.json                       a difference that does not fit in a name: a prompt template, the rows

A name belongs to one identity: the model's weights, the prompts, the settings. The same command writes the same file
again; another one never takes its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_METRICS = "rouge,em"  # of `ssgen evaluate`
_MOST_BYTES = 80  # of the data's name
_DATA_SUFFIXES = re.compile(r"(\.(jsonl?|parquet|csv|tsv|arrow|txt|gz|zst|bz2|xz))+$", re.IGNORECASE)
# How a setting is written in a name, in this order.
_SHORT = {
    "correct": "correct", "max_new_tokens": "tokens", "temperature": "temp", "top_k": "topk", "top_p": "topp",
    "samples": "samples", "seed": "seed", "limit": "first", "max_prompt_tokens": "prompt",
}  # fmt: skip


def data_name(data: str) -> str:
    """A short name of a file, glob, folder or hub id, in characters that every file system takes."""
    for part in reversed(Path(data).parts):
        if cleaned := _cleaned(_DATA_SUFFIXES.sub("", part)):
            return cleaned
    return "data"


def setting_parts(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """`temp0.7`, `tokens64`: those that differ from the defaults."""
    changed = {key: settings[key] for key in _SHORT if key in settings and settings[key] != defaults[key]}
    return [f"{_SHORT[key]}{value if isinstance(value, int) else f'{value:g}'}" for key, value in changed.items()]


def metrics_part(metrics: list[str]) -> str:
    """`math+em`; "" for the default ones."""
    if set(metrics) == set(DEFAULT_METRICS.split(",")):
        return ""
    return re.sub(r"[^\w.+-]+", "-", "+".join(metrics) or "unscored").strip("-.")[:_MOST_BYTES]


def digest(identity: Mapping[str, Any]) -> str:
    """A hash of everything that decides a result. The result stores it as `identity`."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def result_name(data: str, parts: list[str]) -> str:
    return "-".join([data_name(data), *parts])


def name_with_folder(data: str, parts: list[str]) -> str:
    """For a data set whose file has the same name as another one's: `gsm8k-test`."""
    above = _cleaned(Path(data).expanduser().absolute().parent.name)
    return "-".join([*([above] if above else []), result_name(data, parts)])


def name_with_digest(data: str, parts: list[str], identity: str) -> str:
    """For a difference that does not fit in a name."""
    return f"{result_name(data, parts)}-{identity[:6]}"


def _cleaned(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.").encode()[-_MOST_BYTES:].decode(errors="ignore").strip("-.")

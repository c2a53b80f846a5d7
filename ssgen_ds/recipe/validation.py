"""Every problem of a nested dictionary at once, in sentences that name the key and the nearest known one."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]

# What users of other trainers will type.
PEERS_WORDS = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch", "train_batch_size": "global_batch", "batch_size": "global_batch",
    "max_grad_norm": "clip", "gradient_clipping": "clip", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup",
    "warmup_steps": "warmup", "optim": "optimizer", "model_name_or_path": "path", "base_model": "path",
    "torch_dtype": "dtype", "attn_implementation": "attention", "lora_r": "rank", "r": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "dataset": "train", "datasets": "train", "max_length": "max_prompt_tokens",
    "save_steps": "every", "eval_steps": "every", "save_total_limit": "keep", "report_to": "tensorboard",
}  # fmt: skip


def validate(model: type[Model], raw: dict[str, Any], required: dict[str, Any]) -> tuple[Model | None, list[str]]:
    """The model without its faulty keys (None where that is impossible), and a sentence for each problem.

    `required` fills required keys that are missing or were faulty, so that checks across fields can still run.
    """
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        items: list[Any] = error.errors()
        problems = list(dict.fromkeys(_sentence(model, item) for item in items))
        pruned = _without(raw, [item["loc"] for item in items if item["type"] != "missing"])
        try:
            return model.model_validate(_filled(pruned, required)), problems
        except ValidationError:
            return None, problems


def _sentence(model: type[BaseModel], item: Any) -> str:
    """One line for one pydantic error: dotted key, what is wrong, nearest known key."""
    location: Location = item["loc"]
    key = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        near = _nearest_key(str(location[-1]), _known_keys(model, location[:-1]))
        hint = f"; did you mean {'.'.join([*map(str, location[:-1]), near])}?" if near else ""
        return f"{key}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{key}: required, but not given"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _nearest_key(unknown: str, known: list[str]) -> str | None:
    """By spelling, or by the name that other trainers give to the same thing, itself perhaps misspelt."""
    words = {**PEERS_WORDS, **{key: key for key in known}}
    near = difflib.get_close_matches(unknown, [word for word, key in words.items() if key in known], n=1, cutoff=0.5)
    return words[near[0]] if near else None


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Keys of the section at `location`; list indices are passed over."""
    section: Any = model
    for part in location:
        if isinstance(part, int):
            (section,) = get_args(section)  # list[Section] -> Section
        else:
            section = section.model_fields[part].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _without(raw: Any, locations: list[Location]) -> Any:
    """A copy of `raw` lacking the keys at `locations`."""
    if not isinstance(raw, dict):
        return raw
    drop = {location[0] for location in locations if len(location) == 1 or not isinstance(raw.get(location[0]), dict)}
    return {
        key: _without(value, [location[1:] for location in locations if location and location[0] == key])
        for key, value in raw.items()
        if key not in drop
    }


def _filled(raw: dict[str, Any], required: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the required keys it lacks, section by section."""
    filled = {**required, **raw}
    for key, value in required.items():
        if isinstance(value, dict):
            filled[key] = {**value, **raw[key]} if isinstance(raw.get(key), dict) else value
    return filled

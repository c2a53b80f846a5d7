"""The evaluations in a run folder. Each is read completely, or refused with its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.data.repeats import numbered
from ssgen_ds.errors import UserError
from ssgen_ds.run.layout import evaluations_by_step, is_name_of_training
from ssgen_ds.run.read_back import EvaluationFile, PredictionRow, read_mapping, read_rows
from ssgen_ds.run.result_names import name_with_digest, name_with_folder, result_name

FIX = "restore it, or delete it and its predictions"
GAP_FIX = "delete it, and measure it again with `ssgen gap`"


@dataclass(frozen=True)
class BestStep:
    """The evaluated step whose `metric` is best, the earliest of equals."""

    step: int
    metric: str
    value: float


def check_evaluations(run_dir: Path) -> None:
    """Raise UserError that names the first evaluation that cannot be read."""
    for file in evaluations_by_step(run_dir).values():
        read_predictions(file, read_mapping(file, FIX, EvaluationFile))


def read_predictions(file: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The predictions of an evaluation whose content was checked; [] where their file is gone. Ids are unique.

    Raises UserError when some are missing or damaged: numbers over the rest would be wrong.
    """
    path = file.with_name(content["predictions"])
    if not path.is_file():
        return []
    rows = read_rows(path, PredictionRow, FIX)
    expected = EvaluationFile.model_validate(content).num_predictions
    if len(rows) != expected:
        raise UserError(f"{path}: damaged: {len(rows)} whole lines instead of {expected}; {FIX}")
    # Evaluations of earlier versions gave equal rows one id.
    ids = {row["index"]: row["id"] for row in rows}
    names = dict(zip(ids, numbered(ids.values()), strict=True))
    return [row | {"id": names[row["index"]]} for row in rows]


def best_of(values: dict[int, float], metric: str) -> BestStep | None:
    """The step with the highest score, or with the lowest loss."""
    if not values:
        return None
    step = min(values, key=lambda step: (values[step] if metric == "loss" else -values[step], step))
    return BestStep(step, metric, values[step])


def value_of(result: dict[str, Any], metric: str) -> float | None:
    if metric == "loss":
        return result["loss"]
    return result["scores"][metric]["mean"] if metric in result["scores"] else None


def values_by_step(run_dir: Path, metric: str) -> dict[int, float]:
    """The value of `metric` for each evaluation made by training that has it."""
    values = {
        step: value_of(read_mapping(file, FIX, EvaluationFile), metric)
        for step, file in evaluations_by_step(run_dir).items()
    }
    return {step: value for step, value in values.items() if value is not None}


def free_file(folder: Path, data: str, parts: list[str], identity: str, fix: str = FIX) -> Path:
    """The first of a result's names that is free or already holds this result; see result_names.py.

    Raises UserError that names a damaged file, or the file that has the last of these names.
    """
    file = folder / f"{result_name(data, parts)}.json"
    if _is_free(file, identity, fix):
        return file
    if not _is_of(file, data, fix):
        named = folder / f"{name_with_folder(data, parts)}.json"
        if _is_free(named, identity, fix):
            return named
    file = folder / f"{name_with_digest(data, parts, identity)}.json"
    if _is_free(file, identity, fix):
        return file
    raise UserError(f"{file}: is in the way of the result; move it, or name another file with --out")


def _is_free(file: Path, identity: str, fix: str) -> bool:
    return not is_name_of_training(file) and is_ours(file, identity, fix)


def _is_of(file: Path, data: str, fix: str) -> bool:
    """Whether a result was made from this data, however the path is spelt."""
    if not file.is_file():
        return False
    return os.path.abspath(str(read_mapping(file, fix).get("data"))) == os.path.abspath(data)


def is_ours(file: Path, identity: str, fix: str = FIX) -> bool:
    """Whether a result may be written there without loss: nothing is there, or a result with the same identity.

    Raises UserError when it cannot be read.
    """
    if not file.exists() or (file.is_file() and file.stat().st_size == 0):
        return True
    content = read_mapping(file, fix)
    return "identity" in content and content["identity"] == identity

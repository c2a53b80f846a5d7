"""`ssgen compare A.json B.json`: two evaluations of the same examples, paired."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.summary import Prediction, by_example
from ssgen_ds.metrics.intervals import difference
from ssgen_ds.run.evaluations import FIX, read_predictions
from ssgen_ds.run.read_back import EvaluationFile, read_mapping


def compare(before: Path, after: Path) -> dict[str, Any]:
    """The difference B - A of every score that both files have, over the same examples.

    Raises:
        UserError: a file is not an evaluation, or the two have different examples, which cannot be paired.
    """
    results = [_read(before), _read(after)]
    predictions = [_read_predictions(file, result) for file, result in zip((before, after), results, strict=True)]
    _refuse_other_examples(before, after, *predictions)
    names = [name for name in results[0]["scores"] if name in results[1]["scores"]]
    if not names:
        raise UserError(f"{before} and {after} have no score in common: evaluate both with the same --metrics")
    a, b = ({name: by_example(rows, "scores", name) for name in names} for rows in predictions)
    return {
        "kind": "comparison",
        "before": {"file": str(before), "model": results[0]["model"], "settings": results[0]["settings"]},
        "after": {"file": str(after), "model": results[1]["model"], "settings": results[1]["settings"]},
        "num_examples": len(a[names[0]]),
        "num_other_prompts": _num_other_prompts(*predictions),
        "before_scores": {name: results[0]["scores"][name] for name in names},
        "after_scores": {name: results[1]["scores"][name] for name in names},
        "difference": {name: asdict(difference(a[name], b[name])) for name in names},
    }


def _read(file: Path) -> dict[str, Any]:
    result = read_mapping(file, FIX)
    if result.get("kind") != "evaluation":
        raise UserError(f"{file}: is no evaluation; give the F.json of `ssgen evaluate --out F.json`")
    return read_mapping(file, FIX, EvaluationFile)


def _read_predictions(file: Path, result: dict[str, Any]) -> list[Prediction]:
    if rows := read_predictions(file, result):
        return rows
    predictions = file.with_name(result["predictions"])
    raise UserError(f"{predictions}: the predictions of {file} cannot be read: they are gone; evaluate again")


def _num_other_prompts(a: list[Prediction], b: list[Prediction]) -> int:
    """How many examples had another prompt text: another template, or a cut at another length."""
    prompts = [{one["index"]: one["prompt"] for one in rows} for rows in (a, b)]
    return sum(prompts[1][index] != prompt for index, prompt in prompts[0].items())


def _refuse_other_examples(before: Path, after: Path, a: list[Prediction], b: list[Prediction]) -> None:
    keys = [list(dict.fromkeys((one["index"], one["id"], *one["references"]) for one in rows)) for rows in (a, b)]
    if keys[0] == keys[1]:
        return
    if len(keys[0]) != len(keys[1]):
        raise UserError(f"{before} has {len(keys[0])} examples and {after} {len(keys[1])}: evaluate both on the same")
    number = next(i for i, pair in enumerate(zip(*keys, strict=True)) if pair[0] != pair[1])
    raise UserError(
        f"{before} and {after} have different examples (the first: {keys[0][number][1]} and {keys[1][number][1]}): "
        "evaluate both on the same data"
    )

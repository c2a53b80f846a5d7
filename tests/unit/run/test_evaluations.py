"""The evaluations of a run folder: which is best, which are refused, and where a result may be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.run.evaluations import (
    BestStep,
    best_of,
    check_evaluations,
    free_file,
    is_ours,
    read_predictions,
    value_of,
    values_by_step,
)

DECODING = {"max_new_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "correct": 0}
BEHAVIOUR = {"eos_rate": 1.0, "length_ratio": None, "repetition": 0.0, "empty_rate": 0.0, "mean_tokens": 3.0}


def write_step(run_dir: Path, step: int, ids: list[str] | None = None, **scores: float) -> Path:
    """An evaluation of training, its loss 10 / step; with a prediction for each id, or none."""
    file = run_dir / "evaluations" / f"step-{step:08d}.json"
    content = {
        "kind": "evaluation", "model": "m", "data": "d", "step": step, "num_examples": len(ids or []),
        "settings": DECODING, "scores": {name: {"mean": x, "low": x, "high": x} for name, x in scores.items()},
        "behaviour": BEHAVIOUR if ids else {}, "correction": None, "loss": 10 / step,
        "predictions": f"step-{step:08d}.predictions.jsonl",
    }  # fmt: skip
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    if ids:
        rows = [
            {"index": i, "id": name, "sample": 0, "prompt": "p", "references": ["r"], "prediction": "x", "turns": ["x"],
             "stopped": True, "num_tokens": 1, "reference_tokens": 1, "scores": {}, "first_scores": {}}
            for i, name in enumerate(ids)
        ]  # fmt: skip
        file.with_name(content["predictions"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_best_step_is_the_earliest_of_equals() -> None:
    """A score is best when it is high, a loss when it is low."""
    values = {30: 0.5, 10: 0.2, 40: 0.5, 20: 0.2}
    assert best_of(values, "rougeL") == BestStep(30, "rougeL", 0.5)
    assert best_of(values, "loss") == BestStep(10, "loss", 0.2)
    assert best_of({}, "loss") is None


def test_values_are_of_the_steps_that_have_the_metric(tmp_path: Path) -> None:
    """Files with other names than training gives are not looked at."""
    write_step(tmp_path, 5, rougeL=0.25, em=0.0)
    write_step(tmp_path, 20, rougeL=0.75)
    (tmp_path / "evaluations" / "test-step20.json").write_text("no JSON")
    assert values_by_step(tmp_path, "rougeL") == {5: 0.25, 20: 0.75}
    assert values_by_step(tmp_path, "em") == {5: 0.0}
    assert values_by_step(tmp_path, "loss") == {5: 2.0, 20: 0.5}
    assert values_by_step(tmp_path, "math") == {}
    assert value_of({"loss": None, "scores": {}}, "loss") is None


def test_predictions_of_equal_rows_get_ids_of_their_own(tmp_path: Path) -> None:
    """All samples of one row share its id."""
    file = write_step(tmp_path, 5, ids=["x", "y", "x"])
    content, predictions = json.loads(file.read_text()), file.with_name("step-00000005.predictions.jsonl")
    assert [row["id"] for row in read_predictions(file, content)] == ["x", "y", "x#2"]
    predictions.write_text(2 * predictions.read_text())
    content["settings"]["samples"] = 2
    assert [row["id"] for row in read_predictions(file, content)] == ["x", "y", "x#2"] * 2


def test_predictions_are_whole_or_gone_or_refused(tmp_path: Path) -> None:
    file = write_step(tmp_path, 5, ids=["x", "y"])
    predictions, content = file.with_name("step-00000005.predictions.jsonl"), json.loads(file.read_text())
    whole = predictions.read_text()
    check_evaluations(tmp_path)
    predictions.write_text(whole[:-9])
    with pytest.raises(UserError, match=r"predictions\.jsonl: damaged: 1 whole lines instead of 2; restore it, or del"):
        check_evaluations(tmp_path)
    predictions.write_text(whole + whole)
    with pytest.raises(UserError, match="4 whole lines instead of 2"):
        read_predictions(file, content)
    predictions.unlink()
    assert read_predictions(file, content) == []
    file.write_text("{")
    with pytest.raises(UserError, match=r"step-00000005\.json: damaged: "):
        check_evaluations(tmp_path)


def result(file: Path, data: str = "sets/test.jsonl", identity: str = "aaaaaaaa") -> Any:
    file.write_text(json.dumps({"data": data, "identity": identity}))


def test_a_result_takes_the_first_name_that_is_free_or_its_own(tmp_path: Path) -> None:
    """Its data and settings; the same with the folder of the data, of other data; else a part of its identity."""

    def place(data: str, identity: str) -> str:
        return free_file(tmp_path, data, ["step5"], identity).name

    assert place("sets/test.jsonl", "aaaaaaaa") == "test-step5.json"
    result(tmp_path / "test-step5.json")
    assert place("sets/test.jsonl", "aaaaaaaa") == "test-step5.json", "its own"
    assert place("./sets/test.jsonl", "bbbbbbbb") == "test-step5-bbbbbb.json", "the same data, however it is spelt"
    assert place("other/test.jsonl", "cccccccc") == "other-test-step5.json"
    result(tmp_path / "other-test-step5.json", "other/test.jsonl", "dddddddd")
    assert place("other/test.jsonl", "cccccccc") == "test-step5-cccccc.json"
    result(tmp_path / "test-step5-cccccc.json", identity="cccccc-another")
    with pytest.raises(UserError, match=r"test-step5-cccccc\.json: is in the way of the result; move it"):
        place("other/test.jsonl", "cccccccc")


def test_a_name_of_training_is_never_free(tmp_path: Path) -> None:
    assert free_file(tmp_path, "sets/step-00000005.jsonl", [], "aaaaaaaa").name == "sets-step-00000005.json"


def test_whose_a_file_is(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    assert is_ours(file, "a"), "nothing is there"
    file.touch()
    assert is_ours(file, "a"), "nothing is in it"
    result(file, identity="a")
    assert is_ours(file, "a") and not is_ours(file, "b")
    file.write_text("{}")
    assert not is_ours(file, "a"), "a result of an earlier version"
    file.write_text("{")
    with pytest.raises(UserError, match=r"test\.json: damaged: .*; move it away"):
        is_ours(file, "a", "move it away")

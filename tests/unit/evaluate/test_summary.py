"""Predictions -> scores, behaviour and corrections, by hand; and comparisons of two evaluations."""

from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.compare import compare
from ssgen_ds.evaluate.summary import behaviour, repetition, summarize
from ssgen_ds.evaluate.table import print_comparison
from tests.support.report_folder import write_evaluation


def prediction(index: int, first: float, last: float, **changes: Any) -> dict[str, Any]:
    turns = ["draft", "corrected"] if first != last else ["same"]
    return {
        "index": index,
        "id": f"row-{index}",
        "sample": 0,
        "prompt": "the prompt",
        "references": ["gold"],
        "prediction": turns[-1],
        "turns": turns,
        "stopped": True,
        "num_tokens": 6,
        "reference_tokens": 4,
        "scores": {"exact_match": last},
        "first_scores": {"exact_match": first},
    } | changes


def test_corrections_are_counted_by_the_side_they_change_to() -> None:
    """Two wrong answers became right, one right one wrong; 4 of 5 answers changed, one of them from .2 to .4."""
    rows = [prediction(i, *pair) for i, pair in enumerate([(0, 1), (0, 1), (1, 0), (1, 1), (0.2, 0.4)])]
    found = summarize(rows, ["exact_match"])
    correction = found["correction"]
    assert correction["wrong_to_right"] == {"exact_match": 2} and correction["right_to_wrong"] == {"exact_match": 1}
    assert correction["improved"] == {"exact_match": 3} and correction["worsened"] == {"exact_match": 1}
    assert correction["unchanged_share"] == pytest.approx(1 / 5)
    assert correction["first"]["exact_match"]["mean"] == pytest.approx(2.2 / 5)
    assert found["scores"]["exact_match"]["mean"] == pytest.approx(3.4 / 5)
    assert correction["change"]["exact_match"]["mean"] == pytest.approx(1.2 / 5)


def test_nothing_corrected_says_nothing_of_corrections() -> None:
    assert summarize([prediction(0, 1, 1)], ["exact_match"])["correction"] is None


def test_several_answers_to_a_prompt_count_as_one_example() -> None:
    """(1 + 0) / 2 and 1: an example each, so .75, not 2/3."""
    rows = [prediction(0, 1, 1), prediction(0, 0, 0, sample=1), prediction(1, 1, 1)]
    assert summarize(rows, ["exact_match"])["scores"]["exact_match"]["mean"] == 0.75


def test_behaviour_by_hand() -> None:
    """6 + 2 tokens against 4 + 12; one of three ended; one is empty; a row without a reference has no length."""
    rows = [
        prediction(0, 1, 1, stopped=True, prediction="a b c d a b c d"),
        prediction(1, 0, 0, stopped=False, num_tokens=2, reference_tokens=12, prediction=" "),
        prediction(2, 0, 0, stopped=False, num_tokens=7, reference_tokens=0, prediction="x"),
    ]
    assert behaviour(rows) == {
        "eos_rate": pytest.approx(1 / 3),
        "length_ratio": pytest.approx(8 / 16),
        "repetition": pytest.approx((1 / 5) / 3),
        "empty_rate": pytest.approx(1 / 3),
        "mean_tokens": pytest.approx(5),
    }
    assert behaviour(rows[2:])["length_ratio"] is None


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("one two three", 0), ("a b c d", 0), ("a b c d a b c d", 1 / 5), ("no no no no no no", 2 / 3)],
)
def test_repetition(text: str, share: float) -> None:
    """a b c d, b c d a, c d a b, d a b c, a b c d: one of five is a repeat."""
    assert repetition(text) == pytest.approx(share)


# -- two evaluations ---------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, values: list[float], metric: str = "exact_match", **changes: Any) -> Path:
    rows = [prediction(i, value, value, scores={metric: value}, **changes) for i, value in enumerate(values)]
    score = {"mean": sum(values) / len(values), "low": 0, "high": 1}
    write_evaluation(folder, name, rows, model=name, scores={metric: score})
    return folder / f"{name}.json"


def test_two_evaluations_are_compared_example_by_example(tmp_path: Path) -> None:
    found = compare(write(tmp_path, "a", [0, 0, 1, 0.5]), write(tmp_path, "b", [1, 0, 1, 0.25]))
    change = found["difference"]["exact_match"]
    assert change["mean"] == pytest.approx(0.75 / 4)
    assert (change["wins"], change["ties"], change["losses"]) == (1, 2, 1)
    assert found["num_examples"] == 4 and found["after"]["model"] == "b"


def test_prompts_that_are_not_the_same_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path, "a", [0, 1])
    print_comparison(compare(first, write(tmp_path, "same", [0, 1])))
    assert "note:" not in capsys.readouterr().out
    cut = compare(first, write(tmp_path, "cut", [0, 1], prompt="the begin"))
    print_comparison(cut)
    assert cut["num_other_prompts"] == 2
    assert "2 of 2 prompts are not the same text" in capsys.readouterr().out


def test_evaluations_of_other_examples_are_not_compared(tmp_path: Path) -> None:
    first = write(tmp_path, "a", [0, 1])
    with pytest.raises(UserError, match=r"has 2 examples and .* 3"):
        compare(first, write(tmp_path, "more", [0, 1, 1]))
    with pytest.raises(UserError, match=r"different examples \(the first: row-0 and other\)"):
        compare(first, write(tmp_path, "other", [0, 1], id="other"))
    with pytest.raises(UserError, match="no score in common"):
        compare(first, write(tmp_path, "f1", [0, 1], metric="f1"))
    with pytest.raises(UserError, match="is no evaluation"):
        compare(first, tmp_path / "b.json" if (tmp_path / "b.json").write_text("{}") else first)
    (tmp_path / "a.predictions.jsonl").unlink()
    with pytest.raises(UserError, match=r"predictions of .* cannot be read"):
        compare(first, first)

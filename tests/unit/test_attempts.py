"""Starts of a run, and when another one is refused."""

from __future__ import annotations

import pytest

from ssgen_ds.attempts import FAILED, FINISHED, STOPPED, Attempts, crashes_in_a_row
from ssgen_ds.config import Recipe, parse_recipe
from ssgen_ds.errors import UserError


def start(step: int, recipe: str = "r") -> dict:
    return {"step": step, "recipe": recipe}


def end(outcome: str, reason: str = "") -> dict:
    return {"outcome": outcome, "reason": reason}


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ([], []),
        ([start(4), end(FAILED, "a")], ["a"]),
        ([start(4), end(FAILED, "a"), start(4), end(FAILED, "b")], ["a", "b"]),
        ([start(2), end(FAILED, "a"), start(4), end(FAILED, "b")], ["b"]),  # it got further in between
        ([start(4, "old"), end(FAILED, "a"), start(4), end(FAILED, "b")], ["b"]),  # the recipe was changed
        ([start(4), end(FAILED, "a"), start(4), end(STOPPED)], []),
        ([start(4), end(FAILED, "a"), start(4), end(FINISHED)], []),
        ([start(4), end(FAILED, "first"), end(FAILED, "another rank's")], ["first"]),
    ],
)
def test_crashes_in_a_row(rows, reasons):
    assert crashes_in_a_row(rows, 4, "r") == reasons


def test_a_kill_leaves_no_word():
    (reason,) = crashes_in_a_row([start(4)], 4, "r")
    assert "without a word" in reason


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    raw = {
        "model": {"path": "m"},
        "data": {"train": "d"},
        "train": {"max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    return parse_recipe({**raw, "recovery": {"max_restarts": 2}})


def test_after_max_restarts_without_progress_another_start_is_refused_with_the_reason(tmp_path, recipe):
    attempts = Attempts.of(tmp_path / "run")
    for number in range(3):
        attempts.begin(8, recipe)
        attempts.failed(f"it broke, number {number}")
    with pytest.raises(UserError, match=r"started 3 times from step 8 and never got further; .*: it broke, number 2"):
        attempts.begin(8, recipe)
    attempts.begin(9, recipe)  # it got further


def test_without_a_limit_and_with_a_changed_recipe_it_may_start(tmp_path, recipe):
    attempts = Attempts.of(tmp_path / "run")
    for _ in range(3):
        attempts.begin(8, recipe)
        attempts.failed("it broke")
    free = recipe.model_copy(update={"recovery": recipe.recovery.model_copy(update={"max_restarts": 0})})
    attempts.begin(8, free)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 1e-7})})
    attempts.begin(8, other)


def test_a_refused_start_did_not_happen(tmp_path, recipe):
    attempts = Attempts.of(tmp_path / "run")
    attempts.begin(0, recipe)
    attempts.withdraw()
    assert not attempts.file.exists()
    attempts.begin(0, recipe)
    attempts.end(STOPPED, "")
    attempts.begin(2, recipe)
    attempts.withdraw()
    assert len(attempts.file.read_text().splitlines()) == 2


def test_last_words_never_hide_the_error(tmp_path):
    Attempts.of(tmp_path / "missing").failed("x")
    (tmp_path / "attempts.jsonl").mkdir()
    Attempts.of(tmp_path).failed("x")

"""Starts of a run, and when another one is refused."""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest

from ssgen_ds.errors import StopRequested, UserError
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.attempts import FAILED, FINISHED, STOPPED, Attempts, attempt, vain_starts
from ssgen_ds.run.layout import ATTEMPTS_FILE
from ssgen_ds.run.lock import RunLock


def start(step: int | None, recipe: str = "r", job: str = "") -> list[dict]:
    rows = [{"recipe": recipe, "job": job}]
    return rows if step is None else [*rows, {"step": step}]


def failed(reason: str) -> dict:
    return {"outcome": FAILED, "reason": reason}


STOP = {"outcome": STOPPED, "reason": "stop"}


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ([], []),
        ([*start(4), failed("a")], ["a"]),
        ([*start(4), failed("a"), *start(4), failed("b")], ["a", "b"]),
        ([*start(2), failed("a"), *start(4), failed("b")], ["b"]),  # it got further in between
        ([*start(4, "old"), failed("a"), *start(4), failed("b")], ["b"]),  # the recipe was changed
        ([*start(4), failed("a"), *start(4), STOP], []),
        ([*start(4), failed("a"), *start(4), {"outcome": FINISHED, "reason": ""}], []),
        ([*start(4), failed("first"), failed("another rank's")], ["first"]),
        ([*start(4), failed("a"), *start(None), failed("b"), *start(4), failed("c")], ["a", "b", "c"]),
        ([{"recipe": "r", "step": 4, "job": ""}, failed("a")], ["a"]),  # as earlier versions wrote it
        ([failed("of a start that was cut off"), *start(4), failed("a")], ["a"]),
    ],
)
def test_vain_starts(rows, reasons):
    assert vain_starts(rows, 4, "r", "") == reasons


def test_before_the_step_is_known_only_starts_count_that_did_not_know_it_either():
    rows = [*start(4), failed("a"), *start(None), failed("b"), *start(None), failed("c")]
    assert vain_starts(rows, None, "r", "") == ["b", "c"]


def test_a_kill_leaves_no_word():
    (reason,) = vain_starts(start(4), 4, "r", "")
    assert "without a word" in reason


def test_stops_count_where_a_job_requeues_itself_and_nowhere_else():
    rows = [*start(4, job="7"), STOP, *start(4, job="7"), STOP]
    assert vain_starts(rows, 4, "r", "7") == ["stop", "stop"]
    assert vain_starts(rows, 5, "r", "7") == []  # it got further
    assert vain_starts(rows, 4, "r", "8") == []  # submitted again
    assert vain_starts([*start(4), STOP], 4, "r", "") == []  # by hand


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    raw = {
        "model": {"path": "m"},
        "data": {"train": "d"},
        "train": {"max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    return parse_recipe({**raw, "recovery": {"max_restarts": 2}})


@pytest.fixture
def world():
    """One rank."""
    return mock.Mock(is_main=True, together=lambda work: work(), watchdog=mock.Mock())


def run(recipe: Recipe, world, step: int | None, error: Exception | None = None, outcome: str = "") -> None:
    """A start that goes on from `step`; None: it ends before."""
    with attempt(recipe, world) as reach:
        if step is not None:
            reach(step)
        if outcome:
            world.watchdog.last_words(outcome)
            raise KeyError
        if error is not None:
            raise error


def rows_of(recipe: Recipe, tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / ATTEMPTS_FILE).read_text().splitlines()]


@pytest.mark.parametrize(("step", "where"), [(8, "from step 8"), (None, "before its first step was known")])
def test_after_max_restarts_without_progress_another_start_is_refused_with_the_reason(
    tmp_path, recipe, world, step, where
):
    for number in range(3):
        with pytest.raises(KeyError):
            run(recipe, world, step, outcome=f"it broke, number {number}")
    before = rows_of(recipe, tmp_path)
    with pytest.raises(UserError, match=rf"started 3 times {where} and never got further; .*: it broke, number 2"):
        run(recipe, world, 8)
    assert rows_of(recipe, tmp_path) == before, "a refused start did not happen"


def test_it_got_further(tmp_path, recipe, world):
    for step in (8, 8, 8, 9):
        with pytest.raises(KeyError):
            run(recipe, world, step, outcome="it broke")


def test_a_job_that_is_stopped_again_and_again_before_a_step_ends(tmp_path, recipe, world, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(3):
        with pytest.raises(StopRequested):
            run(recipe, world, 8, StopRequested("stopped on request"))
    with pytest.raises(UserError, match=r"started 3 times from step 8 .* stopped on request; .*too short a time limit"):
        run(recipe, world, 8)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    run(recipe, world, 8)


def test_without_a_limit_and_with_a_changed_recipe_it_may_start(tmp_path, recipe, world):
    for _ in range(3):
        with pytest.raises(KeyError):
            run(recipe, world, 8, outcome="it broke")
    free = recipe.model_copy(update={"recovery": recipe.recovery.model_copy(update={"max_restarts": 0})})
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 1e-7})})
    for changed in (free, other):
        with pytest.raises(KeyError):
            run(changed, world, 8, outcome="it broke")


def test_a_refused_start_and_one_with_nothing_to_do_did_not_happen(tmp_path, recipe, world):
    def idle() -> None:
        with attempt(recipe, world) as reach:
            reach(None)

    file = tmp_path / "run" / ATTEMPTS_FILE
    for vain in (lambda: run(recipe, world, 0, UserError("no")), idle):
        with contextlib.suppress(UserError):
            vain()
        assert not file.exists()
    run(recipe, world, 0)
    whole = file.read_text()
    assert [sorted(json.loads(line)) for line in whole.splitlines()] == [
        ["job", "recipe", "time"],
        ["step", "time"],
        ["outcome", "reason", "time"],
    ]
    with pytest.raises(UserError):
        run(recipe, world, 2, UserError("no"))
    idle()
    assert file.read_text() == whole


def test_a_line_that_a_kill_cut_short_is_taken_away(tmp_path, recipe, world):
    run(recipe, world, 0)
    file = tmp_path / "run" / ATTEMPTS_FILE
    with file.open("a") as torn:
        torn.write('{"outcome": "fai')
    run(recipe, world, 2)
    run(recipe, world, 4)
    assert [row["step"] for row in rows_of(recipe, tmp_path) if "step" in row] == [0, 2, 4]


def test_last_words_never_hide_the_error(tmp_path):
    Attempts.of(tmp_path / "missing").failed("x")
    (tmp_path / "attempts.jsonl").mkdir()
    Attempts.of(tmp_path).failed("x")


def test_last_words_of_a_job_whose_folder_was_taken_over_are_not_noted(tmp_path):
    lock = RunLock(tmp_path).acquire()
    first = Attempts.of(tmp_path)
    (tmp_path / ATTEMPTS_FILE).write_text("")
    lock.release()
    successor = RunLock(tmp_path).acquire()
    first.failed("it stood still")
    assert (tmp_path / ATTEMPTS_FILE).read_text() == ""
    Attempts.of(tmp_path).failed("a rank was lost")
    assert "a rank was lost" in (tmp_path / ATTEMPTS_FILE).read_text()
    successor.release()
    first.failed("nobody has it now")
    assert "nobody has it now" in (tmp_path / ATTEMPTS_FILE).read_text()

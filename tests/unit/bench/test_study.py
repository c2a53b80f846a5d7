"""The controlled study: its tasks and statistics by hand-worked values."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from bench.study.intervals import correction_counts, mean_and_seeds, paired_difference
from bench.study.measure import token_accuracy
from bench.study.settings import METHODS, Run, Settings, list_runs, max_answer, recipe_of
from bench.study.tasks import TASKS, write_data


class Dealt(random.Random):
    """Gives the values that a test names, in order."""

    def __init__(self, values):
        self.values = list(values)

    def choices(self, population, k):
        return [self.values.pop(0) for _ in range(k)]

    def randrange(self, stop):
        return self.values.pop(0)


def test_sorting_keeps_letters_that_come_twice():
    assert TASKS["sort"](Dealt("dabad"), 5) == ("dabad", "aabdd")


def test_running_sums_write_place_digit_and_sum_modulo_7():
    """3, 3+5 = 8 -> 1, 1+6 = 7 -> 0, 0+2 = 2."""
    assert TASKS["sums"](Dealt([3, 5, 6, 2]), 4) == ("a3b5c6d2", "a33b51c60d22")


def test_reversing_replaces_each_letter_by_its_own():
    """A letter's replacement is the same everywhere, and no two letters share one."""
    _, single = TASKS["reverse"](Dealt("abc"), 3)
    _, twice = TASKS["reverse"](Dealt("aabc"), 4)
    assert twice == single + single[-1] and len(set(single)) == 3
    _, alphabet = TASKS["reverse"](Dealt("abcdefghijklmnopqrstuvwxyz"), 26)
    assert len(set(alphabet)) == 26


@pytest.mark.parametrize("task", TASKS)
def test_data_come_from_the_task_alone_and_held_out_prompts_are_not_trained_on(tmp_path, task):
    for folder in ("one", "two"):
        write_data(tmp_path / folder, task, num_train=300, train_lengths=(3, 6), eval_lengths=(3, 6), each=20)
    files = [f"{task}-train.jsonl", f"{task}-eval.jsonl"]
    assert [(tmp_path / "one" / name).read_text() for name in files] == [
        (tmp_path / "two" / name).read_text() for name in files
    ]
    train, held_out = ([json.loads(line) for line in (tmp_path / "one" / name).open()] for name in files)
    assert len(train) == 300 and [row["length"] for row in held_out] == [3] * 20 + [6] * 20
    assert len({row["prompt"] for row in held_out}) == 40
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}
    assert all(len(row["completion"]) < max_answer(Settings().tasks[task], task) for row in train + held_out)


def test_every_run_has_a_recipe_and_a_name_of_its_own_and_sft_comes_first(tmp_path):
    settings = Settings()
    runs = list_runs(settings)
    assert len(runs) == len({run.name for run in runs}) == 3 * 3 * len(METHODS)
    assert [run.method for run in runs[:9]] == ["sft"] * 9
    recipes = {run.method: recipe_of(run, settings, tmp_path) for run in runs if run.task == "sort" and run.seed == 1}
    assert recipes["sft 2x"].train.max_steps == 2 * recipes["sft"].train.max_steps
    assert recipes["bss .25 constant"].method.bss.schedule == "constant"
    assert recipes["bss+rac"].method.bss.mix_rate == 0.1 and recipes["bss+rac"].method.rac.correction_cue == "!"
    assert Run("sort", "bss .25 constant", 1).name == "sort-bss-25-constant-1"


def test_mean_over_seeds():
    assert mean_and_seeds(np.array([[1, 0], [1, 1]])) == {"mean": 0.75, "seeds": [0.5, 1.0]}


def test_a_difference_that_all_share_has_no_width():
    found = paired_difference(np.ones((3, 5)), np.zeros((3, 5)))
    assert (found["mean"], found["low"], found["high"]) == (1.0, 1.0, 1.0)
    assert found["seeds"] == [1.0, 1.0, 1.0]


def test_the_interval_is_that_of_the_mean_over_prompts_when_seeds_agree():
    """Half of 100 differences are 1, half 0: mean .5, standard error .05, so about .5 +- 1.96 * .05."""
    ours = np.tile(np.repeat([1, 0], 50), (3, 1))
    found = paired_difference(ours, np.zeros((3, 100)))
    assert found["mean"] == 0.5
    assert found["low"] == pytest.approx(0.402, abs=0.012)
    assert found["high"] == pytest.approx(0.598, abs=0.012)


def test_the_interval_counts_that_seeds_differ():
    """One seed of two gains 1 everywhere: a resample has it 0, 1 or 2 times, a quarter of them none."""
    found = paired_difference(np.repeat([[1], [0]], 50, axis=1), np.zeros((2, 50)))
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.0, 1.0)


def test_correction_counts():
    before, after = np.array([[0, 0, 1], [1, 1, 0]]), np.array([[1, 0, 1], [0, 1, 1]])
    assert correction_counts(before, after) == {"wrong_to_right": 2, "right_to_wrong": 1, "answers": 6}


def test_token_accuracy_counts_missing_tokens_as_wrong_and_ignores_more():
    """Gold has 3 + 2 tokens; 1 + 2 stand right."""
    assert token_accuracy([[7], [5, 6, 9]], [[7, 8, 9], [5, 6]]) == pytest.approx(3 / 5)

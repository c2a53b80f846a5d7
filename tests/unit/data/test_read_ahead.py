"""Reading ahead changes when examples are read, never which."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from ssgen_ds.data.read_ahead import ReadAhead
from ssgen_ds.errors import UserError

SECONDS = 30.0  # for another thread to get its turn


class Plan:
    """Two steps an epoch; notes what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.reached = threading.Semaphore(0)
        self.bad: int | None = None

    def batch(self, step: int) -> list[SimpleNamespace]:
        self.read.append(step)
        self.reached.release()
        if step == self.bad:
            raise UserError(f"rows.jsonl:{step}: bad")
        return [SimpleNamespace(step=step, epoch=step // 2)]

    def epoch(self, step: int) -> int:
        raise AssertionError("a stream would start over")


def test_the_next_steps_are_read_while_nobody_asks():
    plan = Plan()
    ahead = ReadAhead(plan, steps=2, total=10)
    assert ahead.batch(1)[0].step == 1
    for _ in range(3):
        assert plan.reached.acquire(timeout=SECONDS)
    assert plan.read == [1, 2, 3]
    assert ahead.batch(2)[0].step == 2
    assert plan.reached.acquire(timeout=SECONDS)
    assert plan.read == [1, 2, 3, 4]


def test_every_step_is_read_once_in_order_and_none_beyond_the_end():
    plan = Plan()
    ahead = ReadAhead(plan, steps=4, total=7)
    assert [ahead.batch(step)[0].step for step in range(3, 8)] == [3, 4, 5, 6, 7]
    for _ in range(5):
        assert plan.reached.acquire(timeout=SECONDS)
    assert not plan.reached.acquire(timeout=0.3)
    assert plan.read == [3, 4, 5, 6, 7]
    assert [ahead.epoch(step) for step in range(3, 8)] == [1, 2, 2, 3, 3]


def test_what_is_wrong_with_a_later_step_is_raised_there():
    plan = Plan()
    plan.bad = 2
    ahead = ReadAhead(plan, steps=3, total=9)
    assert ahead.batch(1)[0].step == 1
    with pytest.raises(UserError, match=r"rows\.jsonl:2: bad"):
        ahead.batch(2)


def test_what_is_kept_does_not_grow_with_the_run():
    ahead, every = ReadAhead(Plan(), steps=4, total=400), 4
    for first in range(1, 401, every):
        for step in range(first, first + every):
            ahead.batch(step)
        assert [ahead.epoch(step) for step in range(first, first + every)] == [
            s // 2 for s in range(first, first + every)
        ]
        assert len(ahead._epochs) <= every + 1 and len(ahead._read) <= every

"""Reading ahead changes when examples are read, never which."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from ssgen_ds.data.ahead import ReadAhead
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
    assert ahead.batch(0)[0].step == 0
    for _ in range(3):
        assert plan.reached.acquire(timeout=SECONDS)
    assert plan.read == [0, 1, 2]
    assert ahead.batch(1)[0].step == 1
    assert plan.reached.acquire(timeout=SECONDS)
    assert plan.read == [0, 1, 2, 3]


def test_every_step_is_read_once_in_order_and_none_beyond_the_end():
    plan = Plan()
    ahead = ReadAhead(plan, steps=4, total=7)
    assert [ahead.batch(step)[0].step for step in range(2, 7)] == [2, 3, 4, 5, 6]
    for _ in range(5):
        assert plan.reached.acquire(timeout=SECONDS)
    assert not plan.reached.acquire(timeout=0.3)
    assert plan.read == [2, 3, 4, 5, 6]
    assert [ahead.epoch(step) for step in range(2, 7)] == [1, 1, 2, 2, 3]


def test_what_is_wrong_with_a_later_step_is_raised_there():
    plan = Plan()
    plan.bad = 1
    ahead = ReadAhead(plan, steps=3, total=9)
    assert ahead.batch(0)[0].step == 0
    with pytest.raises(UserError, match=r"rows\.jsonl:1: bad"):
        ahead.batch(1)

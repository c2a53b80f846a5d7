from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ssgen_ds.run.progress import Progress, compact, duration

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **extras: Any) -> dict[str, Any]:
    numbers = {"loss": 2.31449, "mix_rate": 0.124, "tokens_per_second": 1234.0}
    return {"step": step, "round": (step + 7) // 8, **numbers, **extras}


def plain(
    num_steps: int, seconds_per_step: float, extras: Callable[[int], dict[str, Any]] = lambda step: {}
) -> list[str]:
    clock, out = Clock(), io.StringIO()
    with Progress(num_steps, True, 1, console=Console(file=out, width=40), clock=clock) as progress:
        for step in range(1, num_steps + 1):
            clock.now += seconds_per_step
            progress.step(row(step, **extras(step)))
    return out.getvalue().splitlines()


def test_plain_line_says_it_all_on_one_line() -> None:
    assert plain(100, 2.0)[11] == "step 12/100  round 2  loss 2.3145  mix 0.12  1.2k tok/s  ETA 2m56s"


def test_slow_steps_get_a_line_each() -> None:
    assert len(plain(20, 1.5)) == 20


def test_fast_steps_share_a_line_but_landmarks_never_go_missing() -> None:
    lines = plain(100, 0.01, lambda step: {"eval_loss": 1.5} if step in (33, 34) else {})
    assert [line.split()[1] for line in lines] == ["1/100", "33/100", "34/100", "100/100"]
    assert "eval 1.5000" in lines[1]


def test_lost_numbers_are_left_out() -> None:
    lines = plain(1, 1.0, lambda step: {"loss": None, "mix_rate": None})
    assert lines == ["step 1/1  round 1  1.2k tok/s  ETA 0s"]


def test_disabled_writes_nothing_on_a_terminal_or_off_it() -> None:
    for is_terminal in (False, True):
        out = io.StringIO()
        with Progress(3, False, 1, console=Console(file=out, force_terminal=is_terminal)) as progress:
            progress.generating(1, 4, 4)
            progress.step(row(1))
            progress.message("checkpoint written")
        assert out.getvalue() == ""


def test_generation_is_reported_now_and_then_and_at_its_end() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(8, True, 1, console=Console(file=out), clock=clock) as progress:
        for done in range(1, 33):
            clock.now += 1.0
            progress.generating(1, done, 32)
        progress.message("checkpoint [1] written")
    assert out.getvalue().splitlines() == [
        *(f"round 1  generating {done}/32" for done in (1, 11, 21, 31, 32)),
        "checkpoint [1] written",
    ]


def test_eta_counts_generation_once_for_each_round_to_come() -> None:
    """Steps of 2 s, rounds of 4 steps that begin with 10 s of generation: after step 1 of 12 are left
    11 * 2 s of training and 2 generations = 42 s; after step 5, 7 * 2 + 10 = 24 s."""
    clock, out = Clock(), io.StringIO()
    with Progress(12, True, 1, steps_per_round=4, console=Console(file=out), clock=clock) as progress:
        for step in range(1, 13):
            generation = 10.0 if step % 4 == 1 else 0.0
            clock.now += 2.0 + generation
            progress.step(row(step, selfgen_seconds=generation))
    lines = out.getvalue().splitlines()
    etas = {line.split()[1].split("/")[0]: line.split()[-1] for line in lines}
    assert (etas["1"], etas["4"], etas["5"], etas["12"]) == ("42s", "36s", "24s", "0s")


def test_eta_after_a_resume_uses_this_process_only() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(100, True, 91, console=Console(file=out), clock=clock) as progress:
        clock.now += 3.0
        progress.step(row(91))
    assert out.getvalue().split()[-1] == "27s"


def live(body: Callable[[Progress], None]) -> str:
    out = io.StringIO()
    with Progress(8, True, 1, console=Console(file=out, force_terminal=True, width=100)) as progress:
        body(progress)
    return out.getvalue()


def test_terminal_shows_one_live_display() -> None:
    def body(progress: Progress) -> None:
        progress.generating(1, 12, 32)
        progress.step(row(1))
        progress.message("checkpoint [1] written")

    text = live(body)
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert "checkpoint [1] written" in text
    assert all(part in text for part in ("step 1/8", "round 1", "done", "loss 2.3145", "mix 0.12", "1.2k tok/s"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_terminal_is_left_clean_after(error: type[BaseException]) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)

    def fail() -> None:
        with Progress(8, True, 1, console=console) as progress:
            progress.step(row(1))
            raise error

    with pytest.raises(error):
        fail()
    assert SHOW_CURSOR in out.getvalue()
    assert out.getvalue().rindex(SHOW_CURSOR) > out.getvalue().rindex("stopped")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1.0k"), (1234, "1.2k"), (9960, "10k"), (34_000, "34k"), (1.5e6, "1.5M")],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (3599.7, "1h00m"), (270_000, "3d03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 9e11))
def test_compact_stays_short(value: float) -> None:
    assert len(compact(value)) <= 4

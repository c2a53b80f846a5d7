"""What a person sees while a run trains: one live display on a terminal, plain lines in a log file. Rank 0 only.

with Progress(total_steps=100, enabled=rank == 0, first_step=1) as progress:
    progress.generating(round=1, done=12, total=32)
    progress.step(row)
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_STEP_LINES = 1.0
SECONDS_BETWEEN_GENERATION_LINES = 10.0
RECENT_STEPS = 32
RECENT_ROUNDS = 4


class Progress:
    """Context manager; with `enabled` False every method does nothing.

    Args:
        total_steps: optimizer steps of the whole run.
        enabled: True on rank 0.
        first_step: the step that this process does first: 1, or the resumed one.
        steps_per_round: optimizer steps per self-generation round; the ETA counts the rounds still to come with it.
        console: where to write; default: standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool,
        first_step: int,
        steps_per_round: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._first_step, self._enabled = total_steps, first_step, enabled
        self._console = console or Console()
        self._clock = clock
        self._eta = _Eta(total_steps, steps_per_round)
        self._row: dict[str, Any] = {"step": first_step - 1}
        self._phase = "starting"
        self._step_ended = self._last_line = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._step_ended = self._clock()
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._phase = "done" if kind is None else "stopped"
            self._live.stop()  # also shows the cursor again and gives stdout back
            self._live = None

    def generating(self, round: int, done: int, total: int, phase: str = "generating") -> None:
        """`done` of `total` sequences of this phase of the round exist: mixing, drafting, rewriting."""
        self._phase = f"{phase} {done}/{total}"
        self._row = {**self._row, "round": round}
        if self._plain and (done == total or self._is_due(SECONDS_BETWEEN_GENERATION_LINES)):
            self._line(f"round {round}  {self._phase}")

    def step(self, row: dict[str, Any]) -> None:
        """One optimizer step is finished; `row` is what the logbook gets."""
        now = self._clock()
        self._eta.add(now - self._step_ended, row.get("selfgen_seconds") or 0.0)
        self._step_ended = now
        self._phase, self._row = "training", row
        is_landmark = row["step"] in (self._first_step, self._total_steps) or "eval_loss" in row
        if self._plain and (is_landmark or self._is_due(SECONDS_BETWEEN_STEP_LINES)):
            place = [f"step {row['step']}/{self._total_steps}", *_round(row), *_numbers(row)]
            self._line("  ".join([*place, f"ETA {self._time_left()}"]))

    def message(self, text: str) -> None:
        """A line that stays: a checkpoint was written, an evaluation began."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        elif self._enabled:
            self._line(text)

    @property
    def _plain(self) -> bool:
        return self._enabled and self._live is None

    def _is_due(self, seconds: float) -> bool:
        return self._clock() - self._last_line >= seconds

    def _line(self, text: str) -> None:
        """Never wrapped: a log line is one line whatever width rich guesses."""
        self._last_line = self._clock()
        print(text, file=self._console.file, flush=True)

    def _time_left(self) -> str:
        seconds = self._eta.seconds_left(self._row["step"])
        return "?" if seconds is None else duration(seconds)

    def _render(self) -> Group:
        step = self._row["step"]
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        bar.add_row(
            ProgressBar(total=self._total_steps, completed=step),
            Text(f"step {step}/{self._total_steps}", style="bold"),
            Text(f"ETA {self._time_left()}"),
        )
        facts = [*_round(self._row), self._phase, *_numbers(self._row)]
        return Group(bar, Text("  ".join(facts), style="dim", no_wrap=True, overflow="ellipsis"))


class _Eta:
    """Mean of recent step times, plus the mean of recent generations for each round still to start.

    Adding generation by round keeps the estimate steady: a step that begins a round is no slower than the others.
    """

    def __init__(self, total_steps: int, steps_per_round: int) -> None:
        self._total_steps, self._steps_per_round = total_steps, steps_per_round
        self._training: deque[float] = deque(maxlen=RECENT_STEPS)
        self._generation: deque[float] = deque(maxlen=RECENT_ROUNDS)

    def add(self, wall_seconds: float, generation_seconds: float) -> None:
        self._training.append(max(wall_seconds - generation_seconds, 0.0))
        if generation_seconds:
            self._generation.append(generation_seconds)

    def seconds_left(self, step: int) -> float | None:
        """None before the first step of this process."""
        if not self._training:
            return None
        rounds_left = math.ceil(self._total_steps / self._steps_per_round) - math.ceil(step / self._steps_per_round)
        generation = rounds_left * _mean(self._generation) if self._generation else 0.0
        return (self._total_steps - step) * _mean(self._training) + generation


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)


def _round(row: dict[str, Any]) -> list[str]:
    return [f"round {row['round']}"] if "round" in row else []


def _numbers(row: dict[str, Any]) -> list[str]:
    """The numbers of a row worth a glance; those that it lacks are left out."""
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {value:.4f}",
        "eval_loss": lambda value: f"eval {value:.4f}",
        "mix_rate": lambda value: f"mix {value:.2f}",
        "tokens_per_second": lambda value: f"{compact(value)} tok/s",
    }
    return [text(row[key]) for key, text in formats.items() if row.get(key) is not None]


def compact(value: float) -> str:
    """Three figures or so: 950, 1.2k, 34k, 1.5M."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if value < 999.5 * size or unit == "G":
            break
    scaled = value / size
    return f"{scaled:.1f}{unit}" if unit and scaled < 9.95 else f"{scaled:.0f}{unit}"


def duration(seconds: float) -> str:
    """Two units: 45s, 3m10s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"

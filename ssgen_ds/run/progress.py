"""What a person sees while a run trains: a live display on a terminal, plain lines in a log file. Rank 0 only.

with Progress(total_steps=100, enabled=rank == 0, first_step=1) as progress:
    progress.generating(round=1, done=12, total=32)
    progress.step(row)
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
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
        self._display: _Display | None = None  # on a terminal

    def __enter__(self) -> Progress:
        self._step_ended = self._clock()
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._display = _Display(console=self._console, refresh_per_second=4, expand=True)
            self._display.add_task("", total=self._total_steps, eta="?")
            self._display.start()
            self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._display is not None:
            self._phase = "done" if kind is None else "stopped"
            self._show()
            self._display.stop()  # also shows the cursor again and gives stdout back
            self._display = None

    def generating(self, round: int, done: int, total: int, phase: str = "generating") -> None:
        """`done` of `total` sequences of this phase of the round exist: mixing, drafting, rewriting."""
        self._phase = f"{phase} {done}/{total}"
        self._row = {**self._row, "round": round}
        self._show()
        if self._plain and (done == total or self._is_due(SECONDS_BETWEEN_GENERATION_LINES)):
            self._line(f"round {round}  {self._phase}")

    def step(self, row: dict[str, Any]) -> None:
        """One optimizer step is finished; `row` is what the logbook gets."""
        now = self._clock()
        self._eta.add(now - self._step_ended, row.get("selfgen_seconds") or 0.0)
        self._step_ended = now
        self._phase, self._row = "training", row
        self._show()
        is_landmark = row["step"] in (self._first_step, self._total_steps) or "eval_loss" in row
        if self._plain and (is_landmark or self._is_due(SECONDS_BETWEEN_STEP_LINES)):
            place = f"step {row['step']}/{self._total_steps}"
            self._line("  ".join([place, *_numbers(row), f"ETA {self._time_left()}"]))

    def message(self, text: str) -> None:
        """Print a line that stays: a checkpoint was written, an evaluation began."""
        if self._display is not None:
            self._console.print(text, markup=False, highlight=False)
        elif self._enabled:
            self._line(text)

    @property
    def _plain(self) -> bool:
        return self._enabled and self._display is None

    def _is_due(self, seconds: float) -> bool:
        return self._clock() - self._last_line >= seconds

    def _line(self, text: str) -> None:
        """Print a line that is never wrapped, whatever width rich guesses."""
        self._last_line = self._clock()
        with suppress(OSError):  # a log on a full disk must not end the run: metrics.jsonl has the numbers
            print(text, file=self._console.file, flush=True)

    def _time_left(self) -> str:
        seconds = self._eta.seconds_left(self._row["step"])
        return "?" if seconds is None else duration(seconds)

    def _show(self) -> None:
        if self._display is not None:
            self._display.facts = "  ".join([self._phase, *_numbers(self._row)])
            self._display.update(self._display.task_ids[0], completed=self._row["step"], eta=self._time_left())


class _Display(progress.Progress):
    """A bar, and below it a line of facts."""

    facts = ""

    @classmethod
    def get_default_columns(cls) -> tuple[progress.ProgressColumn, ...]:
        step, eta = "[bold]step {task.completed}/{task.total}", "ETA {task.fields[eta]}"
        return progress.BarColumn(bar_width=None), progress.TextColumn(step), progress.TextColumn(eta)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.facts, style="dim", no_wrap=True, overflow="ellipsis")


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


def _numbers(row: dict[str, Any]) -> list[str]:
    """The numbers of a row that are worth a glance; missing ones are left out."""
    formats: dict[str, Callable[[float], str]] = {
        "round": lambda value: f"round {value}",
        "loss": lambda value: f"loss {value:.4f}",
        "eval_loss": lambda value: f"eval {value:.4f}",
        "mix_rate": lambda value: f"mix {value:.2f}",
        "tokens_per_second": lambda value: f"{compact(value)} tok/s",
    }
    return [text(row[key]) for key, text in formats.items() if row.get(key) is not None]


def compact(value: float) -> str:
    """About three digits: 950, 1.2k, 34k, 1.5M."""
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

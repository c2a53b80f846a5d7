"""The tables that `evaluate` and `compare` print for people. Scripts read the JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_evaluation(result: dict[str, Any], out: Path) -> None:
    """Scores with their intervals, behaviour, and what the corrections did."""
    console, correction = _console(), result["correction"]
    columns = ["first answer", "corrected", "change", "95 %", "better", "worse"] if correction else ["score", "95 %"]
    rows = []
    for name, score in result["scores"].items():
        if not correction:
            rows.append([name, _number(score["mean"]), _ends(score)])
            continue
        change, first = correction["change"][name], correction["first"][name]
        better, worse = str(correction["improved"][name]), str(correction["worsened"][name])
        rows.append(
            [
                name,
                _number(first["mean"]),
                _number(score["mean"]),
                _change(change["mean"]),
                _ends(change, _change),
                better,
                worse,
            ]
        )
    if rows:
        console.print(_table(f"{result['num_examples']} examples", columns, rows))
    console.print(_behaviour(result), soft_wrap=True)
    console.print(str(out), soft_wrap=True)


def _behaviour(result: dict[str, Any]) -> str:
    found, correction = result["behaviour"], result["correction"]
    parts = [
        f"{found['eos_rate']:.0%} ended by themselves",
        f"{found['mean_tokens']:.1f} tokens an answer",
        f"{found['repetition']:.1%} of 4-grams repeated",
    ]
    if found["length_ratio"] is not None:
        parts.insert(2, f"{found['length_ratio']:.2f} times the references' length")
    if found["empty_rate"]:
        parts.append(f"{found['empty_rate']:.1%} empty")
    if correction:
        parts.append(f"{correction['unchanged_share']:.0%} not changed by correcting")
    return "; ".join(parts)


def print_comparison(result: dict[str, Any]) -> None:
    """The second against the first."""
    console = _console()
    for name in ("before", "after"):
        console.print(f"{name}: {result[name]['model']} ({result[name]['file']})", soft_wrap=True)
    if other := result["num_other_prompts"]:
        console.print(
            f"note: {other} of {result['num_examples']} prompts are not the same text in both: another template, or "
            "cut at another length; --prompt and --max-prompt-tokens make them the same",
            soft_wrap=True,
        )
    rows = []
    for name, found in result["difference"].items():
        before, after = (_number(result[f"{when}_scores"][name]["mean"]) for when in ("before", "after"))
        counts = [str(found[key]) for key in ("wins", "ties", "losses")]
        rows.append(
            [name, before, after, _change(found["mean"]), _ends(found, _change), f"{found['p_value']:.4f}", *counts]
        )
    columns = ["before", "after", "difference", "95 %", "p", "better", "same", "worse"]
    console.print(_table(f"{result['num_examples']} examples, paired", columns, rows))


def _console() -> Console:
    """As wide as the terminal. In a file or a pipe it is wide enough that no row is broken."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _ends(score: dict[str, float], number: Callable[[float], str] | None = None) -> str:
    show = number or _number
    return f"{show(score['low'])} to {show(score['high'])}"


def _change(value: float) -> str:
    return f"{value:+.3f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

"""Accuracy against length, and the gap curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "sft": "#222222",
    "sft 2x": "#9a9a9a",
    "bss .1": "#8ec1e8",
    "bss .25": "#3a86c8",
    "bss .1 constant": "#8a5fbf",
    "bss .25 constant": "#0b3c78",
    "rac": "#d9772b",
    "bss+rac": "#4a9d5b",
}
LABELS = {
    "sft": "SFT",
    "sft 2x": "SFT, twice the steps",
    "bss .1": "BSS .1, linear",
    "bss .25": "BSS .25, linear",
    "bss .1 constant": "BSS .1, constant",
    "bss .25 constant": "BSS .25, constant",
    "rac": "RAC",
    "bss+rac": "BSS .1, linear, and RAC",
}
TITLES = {"reverse": "reverse and substitute", "sort": "sort", "sums": "running sums, written out"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}


def draw_lengths(summary: dict[str, Any], path: Path) -> None:
    """Exact match of answers and, dashed, of corrections, against the prompt's length: greedy above, sampled below."""

    def draw(axes: Any, task: str, row: int) -> None:
        name = ("greedy", "sampled")[row]
        for method, entry in summary["tasks"][task].items():
            for answers, dashes in ((name, "o-"), (f"{name}_corrected", "s--")):
                if answers in entry["answers"]:
                    by_length = entry["answers"][answers]["by_length"]
                    label = LABELS[method] + (", corrected once" if answers != name else "")
                    x = [int(length) for length in by_length]
                    axes.plot(x, by_length.values(), dashes, color=COLOURS[method], markersize=3.5, label=label)
        axes.set_xticks(x)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("digits" if task == "sums" else "letters")

    _grid(summary, path, draw, ("exact match, greedy", "exact match, sampled"))


def draw_gap(summary: dict[str, Any], path: Path) -> None:
    """NLL of gold tokens less that of the SFT models: after each model's own contexts, and all after SFT's."""

    def draw(axes: Any, task: str, row: int) -> None:
        contexts = ("own", "sft")[row]
        entries = summary["tasks"][task]
        for method, entry in entries.items():
            y = [
                at["nll"]["mean"] - base["nll"]["mean"]
                for at, base in zip(entry["gap"][contexts].values(), entries["sft"]["gap"]["own"].values(), strict=True)
            ]
            axes.plot(range(len(y)), y, "o-", color=COLOURS[method], markersize=3.5, label=LABELS[method])
        axes.set_xticks(range(len(y)), list(entry["gap"][contexts]))
        axes.set_xlabel("mix rate of the context")

    rows = (
        "NLL of gold above SFT's, nats:\neach on its own contexts",
        "NLL of gold above SFT's, nats:\nall on SFT's contexts",
    )
    _grid(summary, path, draw, rows)


def _grid(summary: dict[str, Any], path: Path, draw: Any, rows: tuple[str, ...]) -> None:
    """A column for each task that has results."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task, entries in summary["tasks"].items() if entries]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(tasks), 5.6), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), len(tasks), squeeze=False, sharey=False)
        for column, task in enumerate(tasks):
            for row, label in enumerate(rows):
                draw(grid[row][column], task, row)
                if column == 0:
                    grid[row][column].set_ylabel(label)
            grid[0][column].set_title(TITLES[task])
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

"""The figure of `ssgen gap`, drawn from gap.json alone: as one PNG, or as one SVG for each panel in the report.

A model has a colour and a marker, contexts have a line style. Bands are 95 % intervals; names stand at the lines' ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssgen_ds.report.curves import CSS_COLOURS, INK, STYLE, Curve, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Gap = dict[str, Any]  # gap.json
# Colours that colour-blind readers can distinguish (Okabe & Ito 2008), and the CSS value for each.
SERIES = (
    ("#5a5a5a", "var(--muted)"),
    ("#0072b2", "var(--gold)"),
    ("#d55e00", "var(--self)"),
    ("#009e73", "var(--eval)"),
    ("#aa4499", "#b565a7"),
)
MARKERS = "sovD^"
PAPER: Any = {
    "text.color": "#222222", "axes.labelcolor": "#222222", "axes.edgecolor": "#999999", "grid.color": "#e3e3e3",
    "xtick.color": "#444444", "ytick.color": "#444444", "font.size": 8, "axes.titlesize": 9,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
}  # fmt: skip
PANEL_SIZE = (3.45, 2.55)  # inches; two fill a page's width
LONGEST_NAME = 14
_END_LABEL = "end"


@dataclass(frozen=True)
class Panel:
    name: str
    title: str
    x_label: str
    y_label: str
    draw: Callable[[Axes], None]


def save_figure(gap: Gap, file: Path) -> None:
    """All panels as one PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(gap)
    columns = 2 if len(shown) > 3 else len(shown)
    rows = math.ceil(len(shown) / columns)
    with rc_context(STYLE | PAPER):
        figure = Figure(figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.08, h_pad=0.08)
        for number, panel in enumerate(shown, 1):
            axes = figure.add_subplot(rows, columns, number)
            _draw(axes, panel)
            axes.set_title(f"{'abcd'[number - 1]}  {panel.title}")
        _spread_labels(figure)
        figure.savefig(file, format="png", dpi=200, facecolor="white")


def gap_curves(gap: Gap) -> list[Curve]:
    """Each panel as an <svg> element whose colours follow the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = []
    with rc_context(STYLE):
        for panel in panels(gap):
            figure = Figure(figsize=(4.2, 2.7), layout="constrained")
            _draw(figure.add_subplot(), panel)
            _spread_labels(figure)
            svg = to_svg(figure, f"gap-{panel.name}", CSS_COLOURS | dict(SERIES))
            curves.append(Curve(panel.title, svg))
    return curves


def panels(gap: Gap) -> list[Panel]:
    """The panels in reading order. The one on shared contexts needs two models to compare."""
    names = [model["name"] for model in gap["models"]]
    nll, accuracy, rate = "NLL of gold tokens (nats)", "gold token is top-1", "mix rate"
    own = [curve for curve in gap["curves"] if curve["contexts"] == "own"]
    shared = [curve for curve in gap["curves"] if curve["contexts"] != "own"]
    whose = "Each on its own contexts" if shared else "On its own contexts"
    found = [Panel("nll", whose, rate, nll, lambda axes: _rates(axes, own, names, "nll"))]
    if shared:
        author = shared[0]["contexts"]
        together = [curve for curve in own if curve["model"] == author] + shared
        title = f"All on the contexts of {_short(author)}"
        found.append(Panel("shared", title, rate, nll, lambda axes: _rates(axes, together, names, "nll")))
    found.append(
        Panel("accuracy", "Accuracy, own contexts", rate, accuracy, lambda axes: _rates(axes, own, names, "accuracy"))
    )
    position = "position in the response (tokens)"
    found.append(
        Panel("position", "Where the gap is", position, nll, lambda axes: _positions(axes, gap["by_position"], names))
    )
    return found


def _draw(axes: Axes, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _rates(axes: Axes, curves: list[dict[str, Any]], names: list[str], key: str) -> None:
    """`key` against the mix rate; its axis is the rate's square root, so that low rates do not overlap."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for curve in curves:
        _line(axes, curve["rates"], curve, key, names.index(curve["model"]), "-", _short(curve["model"]))
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    rates = curves[0]["rates"]
    ticks = [rates[0]]
    for rate in rates[1:]:
        if math.sqrt(rate) - math.sqrt(ticks[-1]) > 0.08:
            ticks.append(rate)
    axes.set_xticks(ticks, [f"{rate:g}".removeprefix("0") or "0" for rate in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    if key == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _positions(axes: Axes, lines: list[dict[str, Any]], names: list[str]) -> None:
    """NLL after gold and after self-generated contexts; a bin is drawn at the geometric mean of its positions."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, NullLocator

    for line in lines:
        places = [math.sqrt((begin + 1) * end) for begin, end in zip(line["begin"], line["end"], strict=True)]
        is_free = line["rate"] > 0
        label = _short(line["model"]) if is_free else ""
        _line(axes, places, line, "nll", names.index(line["model"]), "-" if is_free else (0, (2.5, 1.5)), label)
    longest = max(line["end"][-1] for line in lines)
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000) if tick <= longest]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    styles: list[tuple[Any, str]] = [("-", "after its own tokens"), ((0, (2.5, 1.5)), "after gold tokens")]
    handles = [Line2D([], [], color=INK, linestyle=style, linewidth=1.2, label=text) for style, text in styles]
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))
    axes.legend(handles=handles, loc="best", handlelength=2.0, labelspacing=0.25, borderpad=0.2)


def _line(axes: Axes, x: list[float], numbers: dict[str, Any], key: str, model: int, style: Any, label: str) -> None:
    """One line with its band, and its name at the end."""
    colour, marker = SERIES[model % len(SERIES)][0], MARKERS[model % len(MARKERS)]
    axes.fill_between(x, numbers[f"{key}_low"], numbers[f"{key}_high"], color=colour, alpha=0.13, linewidth=0)
    axes.plot(
        x, numbers[key], color=colour, linestyle=style, linewidth=1.3, marker=marker if label else "", markersize=3.2
    )
    if label:
        axes.annotate(
            label, (x[-1], numbers[key][-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center",
            annotation_clip=False, gid=_END_LABEL,
        )  # fmt: skip


def _spread_labels(figure: Figure) -> None:
    """Lay the figure out for good, then move the names at the ends of lines apart where they would overlap."""
    layout: Any = figure.get_layout_engine()
    layout.execute(figure)
    figure.set_layout_engine("none")
    points = 72 / figure.dpi
    for axes in figure.axes:
        labels: list[Any] = [text for text in axes.texts if text.get_gid() == _END_LABEL]
        height = max((label.get_window_extent().height * points for label in labels), default=0.0)
        wanted = [axes.transData.transform(label.xy)[1] * points for label in labels]
        for label, place, new in zip(labels, wanted, spread(wanted, height), strict=True):
            label.set_position((6, new - place))


def spread(wanted: list[float], distance: float) -> list[float]:
    """Places in the same order, at least `distance` apart, and otherwise as near as possible to the wanted ones.

    Neighbours that would overlap form a block around their mean.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[int]] = []
    centre = lambda block: sum(wanted[i] for i in block) / len(block)  # noqa: E731
    for i in order:
        blocks.append([i])
        while len(blocks) > 1:
            before, last = blocks[-2:]
            if centre(last) - centre(before) >= distance * (len(before) + len(last)) / 2:
                break
            blocks[-2:] = [before + last]
    places = [0.0] * len(wanted)
    for block in blocks:
        for rank, i in enumerate(block):
            places[i] = centre(block) + (rank - (len(block) - 1) / 2) * distance
    return places


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 + 1 :]}"

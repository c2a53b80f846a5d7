"""The report's figures: matplotlib drawings as SVG text; their colours are CSS variables and follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

# Figures are drawn with these colours. `to_svg` replaces them by the page's variables, which differ in light and dark.
INK, RULE, GOLD, SELF, EVAL = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS_COLOURS = {INK: "var(--muted)", RULE: "var(--rule)", GOLD: "var(--gold)", SELF: "var(--self)", EVAL: "var(--eval)"}
STYLE: Any = {
    "svg.fonttype": "none",  # real text in the page's own font
    "svg.hashsalt": "ssgen",  # the same run gives the same file
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    title: str
    svg: str
    is_wide: bool = False  # as wide as two others


@dataclass(frozen=True)
class RoundCost:
    """What one self-generation round cost: model passes, and generation's part of the time, 0 to 1."""

    number: int
    passes: float
    generation_share: float


def draw_curves(rows: Rows, best: dict[str, Any] | None = None) -> list[Curve]:
    """Draw every figure for which the rows have numbers, in reading order.

    Args:
        rows: metrics.jsonl, in step order.
        best: checkpoints/best.json; marked here if the loss chose it.
    """
    curves = [_loss_curve(rows, best)]
    if any(_series(rows, "sampled_token_share")[1]) or any(_series(rows, "mix_rate")[1]):
        curves.append(_mixing_curve(rows))
    curves.append(_single_curve(rows, "lr", "Learning rate", "learning rate"))
    curves.append(_single_curve(rows, "grad_norm", "Gradient norm", "global L2 norm, before clipping"))
    return curves


def draw_cost_curves(rows: Rows) -> list[Curve]:
    """Draw the cost of generation for each round; nothing without generation."""
    rounds, curves = round_costs(rows), []
    if any(item.passes for item in rounds):
        curves.append(_passes_curve(rounds))
    if any(item.generation_share for item in rounds):
        curves.append(_time_curve(rounds))
    return curves


def draw_score_curves(
    evaluations: list[tuple[int, dict[str, Any]]],
    best: dict[str, Any] | None,
    title_of: Callable[[str], str],
) -> list[Curve]:
    """Draw a figure for each metric: its mean and 95 % interval at the steps of two or more evaluations by training.

    Args:
        evaluations: (step, metric -> mean, low, high), in step order.
        best: checkpoints/best.json; its step is marked in every figure.
        title_of: turns a metric's name into a title.
    """
    if len(evaluations) < 2:
        return []
    names = list(dict.fromkeys(name for _, scores in evaluations for name in scores))
    return [_score_curve(name, title_of(name), evaluations, best) for name in names]


def _score_curve(name: str, title: str, evaluations: list[tuple[int, dict[str, Any]]], best: Any) -> Curve:
    known = [(step, scores[name]) for step, scores in evaluations if name in scores]
    steps = [step for step, _ in known]

    def draw(axes: Axes) -> None:
        low, mean, high = ([score[key] for _, score in known] for key in ("low", "mean", "high"))
        axes.fill_between(steps, low, high, color=EVAL, alpha=0.16, linewidth=0)
        axes.plot(steps, mean, color=EVAL, **_dots(steps))
        axes.set_ylabel("mean and 95 % interval")
        if not any(high):
            axes.set_ylim(0, 1)  # all 0: not a scale around 0
        if best is not None and best["step"] in steps:
            _mark_best(axes, best["step"], mean[steps.index(best["step"])])

    return Curve(title, _svg(draw, "score-" + re.sub(r"\W", "-", name)))


def _mark_best(axes: Axes, step: int, value: float) -> None:
    """Draw a ring around the step of the best checkpoint."""
    axes.plot(
        [step], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=SELF, label=f"best, step {step}"
    )


def round_costs(rows: Rows) -> list[RoundCost]:
    """One entry for each round. The first row of a round holds the cost of its generation."""
    groups: dict[int, Rows] = {}
    for row in rows:
        groups.setdefault(row["round"], []).append(row)
    rounds = []
    for number, group in groups.items():
        generation, training = total(group, "selfgen_seconds"), total(group, "step_seconds")
        passes = max(_series(group, "selfgen_passes")[1], default=0.0)
        rounds.append(RoundCost(number, passes, generation / max(generation + training, 1e-9)))
    return rounds


def total(rows: Rows, key: str) -> float:
    """The sum of a column. A missing or unknown (null) value counts as 0."""
    return sum(_series(rows, key)[1])


def smooth(values: list[float], window: int) -> np.ndarray:
    """Centred running mean over `window` (odd) values; the window shrinks symmetrically towards both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(np.minimum(centre, centre[::-1]), window // 2)
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def smoothing_window(num_steps: int) -> int:
    """A twentieth of the run, odd; 1 (no smoothing) for the shortest runs."""
    return max(num_steps // 20, 1) // 2 * 2 + 1


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number for `key`."""
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in known], [float(value) for _, value in known]


def _loss_curve(rows: Rows, best: dict[str, Any] | None) -> Curve:
    steps, losses = _series(rows, "loss")
    eval_steps, eval_losses = _series(rows, "eval_loss")
    window = smoothing_window(len(losses))

    def draw(axes: Axes) -> None:
        if window > 1:
            axes.plot(steps, losses, color=GOLD, alpha=0.28, linewidth=0.9, label="training")
            axes.plot(steps, smooth(losses, window), color=GOLD, label=f"mean of {window} steps")
        else:
            axes.plot(steps, losses, color=GOLD, label="training", **_dots(steps))
        if eval_steps:
            axes.plot(eval_steps, eval_losses, "o-", color=EVAL, markersize=4.5, linewidth=1, label="evaluation")
        if best is not None and best["metric"] == "loss" and best["step"] in eval_steps:
            _mark_best(axes, best["step"], eval_losses[eval_steps.index(best["step"])])
        axes.set_ylabel("nats per token")

    return Curve("Loss", _svg(draw, "loss", size=(8.6, 2.9)), is_wide=True)


def _mixing_curve(rows: Rows) -> Curve:
    def draw(axes: Axes) -> None:
        lines = (
            ("mix_rate", INK, "mix rate"),
            ("sampled_token_share", SELF, "sampled"),
            ("changed_token_share", GOLD, "sampled and not gold"),
        )
        for key, colour, label in lines:
            steps, values = _series(rows, key)
            if steps:
                axes.plot(steps, values, color=colour, label=label, **_dots(steps))
        axes.set_ylabel("share of response tokens")
        axes.set_ylim(bottom=0)

    return Curve("Self-generated tokens", _svg(draw, "mix"))


def _passes_curve(rounds: list[RoundCost]) -> Curve:
    def draw(axes: Axes) -> None:
        numbers = [item.number for item in rounds]
        axes.plot(numbers, [item.passes for item in rounds], color=SELF, **_dots(numbers))
        axes.set_ylabel("model passes")
        axes.set_ylim(bottom=0)

    return Curve("Passes per round", _svg(draw, "passes", x_label="round"))


def _time_curve(rounds: list[RoundCost]) -> Curve:
    from matplotlib.ticker import PercentFormatter

    def draw(axes: Axes) -> None:
        numbers = [item.number for item in rounds]
        shares = [item.generation_share for item in rounds]
        axes.fill_between(numbers, shares, color=SELF, alpha=0.16, linewidth=0)
        axes.plot(numbers, shares, color=SELF, **_dots(numbers))
        axes.set_ylabel("share of wall-clock time")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))

    return Curve("Time spent generating", _svg(draw, "time", x_label="round"))


def _single_curve(rows: Rows, key: str, title: str, y_label: str) -> Curve:
    def draw(axes: Axes) -> None:
        steps, values = _series(rows, key)
        axes.plot(steps, values, color=GOLD, **_dots(steps))
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)

    return Curve(title, _svg(draw, key))


def _dots(points: list[int]) -> dict[str, Any]:
    """Show the points of short lines: a single point would draw no line at all."""
    return {"marker": "o", "markersize": 3.5} if len(points) <= 24 else {}


def _svg(
    draw: Callable[[Axes], None], name: str, x_label: str = "optimizer step", size: tuple[float, float] = (4.2, 2.5)
) -> str:
    """Run `draw(axes)` on a new figure of this size in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        if name == "lr":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        if axes.get_legend_handles_labels()[0]:
            columns = 4 if size[0] > 6 else 2
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, borderpad=0, handlelength=1.4
            )
        return to_svg(figure, name, CSS_COLOURS)


def to_svg(figure: Figure, name: str, colours: Mapping[str, str]) -> str:
    """The figure as an <svg> element that can stand in a page with others, `colours` replaced by their CSS values.

    `savefig` would draw everything twice: once to lay it out, once into the file.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and matplotlib may give one twice
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img" xmlns:xlink="http://www.w3.org/1999/xlink">', svg
    )
    return re.sub("|".join(colours), lambda found: colours[found[0]], svg)

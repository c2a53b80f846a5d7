"""Evaluations as the report shows them: intervals on a common scale, paired changes, effects of corrections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.report.read_run import Evaluation, Run
from ssgen_ds.run.read_back import Decoding

METRIC_TITLES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "Exact match",
    "f1": "F1",
    "math": "Maths equality",
}
IntervalDict = dict[str, float]  # mean, low, high; of a change also p_value


@dataclass(frozen=True)
class Bar:
    """One interval; `left`, `width` and `dot` are percentages of the plot's scale."""

    label: str
    score: IntervalDict
    is_base: bool
    left: float
    width: float
    dot: float


@dataclass(frozen=True)
class ForestPlot:
    """One metric; all bars share the scale that begins at `low` and ends at `high`."""

    title: str
    low: float
    high: float
    bars: list[Bar]


@dataclass(frozen=True)
class Group:
    """Evaluations on the same examples. Others must not be compared."""

    data: str
    caption: str
    evaluations: list[Evaluation]
    plots: list[ForestPlot]


def metric_title(name: str) -> str:
    """A metric's name as people write it. A user's own metric keeps its name."""
    return METRIC_TITLES.get(name, name)


def number(value: float | None) -> str:
    """Three decimals for small numbers, one for large ones, and a dash for an unknown number."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(score: IntervalDict, sign: str = "") -> str:
    """`0.231 [0.210, 0.250]`; `sign` is "+" for a change."""
    low, mean, high = (f"{score[key]:{sign}.3f}" for key in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def probability(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def primary_metric(run: Run, evaluation: Evaluation) -> str | None:
    """The metric that chooses checkpoints, if the evaluation has it; else its first metric; None without scores."""
    if run.best is not None and run.best["metric"] in evaluation.scores:
        return run.best["metric"]
    return next(iter(evaluation.scores), None)


def shown_evaluations(run: Run) -> list[Evaluation]:
    """The evaluations of `ssgen evaluate`; without any, the first, the best and the last made by training."""
    if run.by_command or not run.during_training:
        return run.by_command
    steps = run.during_training
    best = [one for one in steps if run.best is not None and one.step == run.best["step"]]
    chosen = {id(one): one for one in (steps[0], *best, steps[-1])}
    return sorted(chosen.values(), key=lambda one: one.step or 0)


def main_evaluation(run: Run) -> Evaluation | None:
    """The evaluation that stands for the run: by `ssgen evaluate`, else the best or the last made by training."""
    own = [one for one in run.by_command if run.is_own(one.content["model"])]
    others = [one for one in run.by_command if not run.is_base(one.content["model"])]
    best = [one for one in run.during_training if run.best is not None and one.step == run.best["step"]]
    for candidates in (own, others, best, run.during_training, run.by_command):
        if candidates:
            return max(candidates, key=lambda one: (bool(one.predictions), one.model_step, one.correction is not None))
    return None


def base_of(run: Run, evaluation: Evaluation) -> Evaluation | None:
    """The model before training, evaluated on the same examples: with the same settings, or the most similar ones."""
    alike = [
        one
        for one in run.by_command
        if run.is_base(one.content["model"]) and one is not evaluation and _same_examples(one, evaluation)
    ]
    return min(alike, key=lambda one: _num_differences(one, evaluation), default=None)


def _num_differences(one: Evaluation, other: Evaluation) -> int:
    """The number of settings that differ, plus the number of scores that only the other has."""
    keys = set(Decoding.model_fields)
    here, there = (Decoding.model_validate(item.content["settings"]).model_dump(include=keys) for item in (one, other))
    return sum(here[key] != there[key] for key in keys) + len(other.scores.keys() - one.scores.keys())


def _same_examples(one: Evaluation, other: Evaluation) -> bool:
    return one.content["data"] == other.content["data"] and one.content["num_examples"] == other.content["num_examples"]


def paired_change(before: Evaluation, after: Evaluation, metric: str) -> IntervalDict | None:
    """The mean change of the examples' scores, its interval and p-value. None if the answers cannot be paired."""
    from ssgen_ds.metrics.intervals import difference

    old, new = _score_by_example(before, metric), _score_by_example(after, metric)
    if not old or old.keys() != new.keys():
        return None
    change = difference(list(old.values()), [new[key] for key in old])
    return {"mean": change.mean, "low": change.low, "high": change.high, "p_value": change.p_value}


def _score_by_example(evaluation: Evaluation, metric: str) -> dict[Any, float]:
    """The score of each example. An example with several answers counts once, with their mean."""
    scores: dict[Any, list[float]] = {}
    for row in evaluation.predictions:
        if metric in row["scores"]:
            scores.setdefault((row["index"], row["id"]), []).append(row["scores"][metric])
    return {key: sum(values) / len(values) for key, values in scores.items()}


def group_evaluations(run: Run) -> list[Group]:
    """Groups in the order of their first evaluation. In each group the base model comes first."""
    groups: dict[tuple[str, int], list[Evaluation]] = {}
    for one in shown_evaluations(run):
        groups.setdefault((one.content["data"], one.content["num_examples"]), []).append(one)
    return [Group(data, _caption(members), members, _plots(run, members)) for (data, _), members in groups.items()]


def _caption(evaluations: list[Evaluation]) -> str:
    """The data, and the settings where all evaluations share them."""
    content = evaluations[0].content
    how = {describe_settings(one.content["settings"]) for one in evaluations}
    data = content["data"] if "evaluation examples" in content["data"] else Path(content["data"]).name
    first = f"{content['num_examples']} examples of {data}"
    return f"{first}, {how.pop()}" if len(how) == 1 else first


def describe_settings(settings: dict[str, Any]) -> str:
    """How the answers were decoded: `greedy, at most 64 tokens`."""
    parts = ["greedy"]
    if settings["temperature"]:
        parts = [f"temperature {settings['temperature']:g}"]
        parts += [
            f"top-{key[-1]} {settings[key]:g}" for key, off in (("top_k", 0), ("top_p", 1)) if settings[key] != off
        ]
    parts.append(f"at most {settings['max_new_tokens']} tokens")
    if "samples" in settings and settings["samples"] > 1:
        parts.append(f"{settings['samples']} answers each")
    if settings["correct"]:
        parts.append(f"up to {settings['correct']} correction{'s' * (settings['correct'] > 1)}")
    return ", ".join(parts)


def _plots(run: Run, evaluations: list[Evaluation]) -> list[ForestPlot]:
    names = list(dict.fromkeys(name for one in evaluations for name in one.scores))
    return [_plot(metric_title(name), _lines(run, evaluations, name)) for name in names]


def _lines(run: Run, evaluations: list[Evaluation], metric: str) -> list[tuple[str, IntervalDict, bool]]:
    """(label, score, is the base model). A corrected evaluation has two lines."""
    lines = []
    for one in evaluations:
        if metric not in one.scores:
            continue
        label = one.label
        is_base = run.is_base(one.content["model"])
        if one.correction is None:
            lines.append((label, one.scores[metric], is_base))
        else:
            lines.append((f"{label}, first answer", one.correction["first"][metric], is_base))
            lines.append((f"{label}, corrected", one.scores[metric], is_base))
    return lines


def _plot(title: str, lines: list[tuple[str, IntervalDict, bool]]) -> ForestPlot:
    low = min(score["low"] for _, score, _ in lines)
    high = max(score["high"] for _, score, _ in lines)
    low, high = _round_ends(low, high)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    bars = [
        Bar(
            label, score, is_base, place(score["low"]), place(score["high"]) - place(score["low"]), place(score["mean"])
        )
        for label, score, is_base in lines
    ]
    return ForestPlot(title, low, high, bars)


def _round_ends(low: float, high: float) -> tuple[float, float]:
    """Round numbers around both ends, with a little room. A single number between 0 and 1 gets the scale 0 to 1."""
    if low == high and 0 <= low <= 1:
        return 0.0, 1.0
    room = 0.05 * (high - low) or abs(high)
    size = 10 ** math.floor(math.log10((high - low + 2 * room) / 2))
    step = next(size * factor for factor in (0.5, 1, 2, 5, 10) if high - low + 2 * room <= 6 * size * factor)
    begin, end = math.floor((low - room) / step) * step, math.ceil((high + room) / step) * step
    return (max(begin, 0.0) if low >= 0 else begin), end


def behaviour_rows(evaluations: list[Evaluation]) -> list[list[str]]:
    """How the answers are, whatever they say: a row of cells for each evaluation."""
    rows = []
    for one in evaluations:
        behaviour = one.content["behaviour"]
        if not behaviour:  # training that only looks at the loss
            continue
        ended, repeated, empty = (f"{behaviour[key]:.0%}" for key in ("eos_rate", "repetition", "empty_rate"))
        ratio = "–" if behaviour["length_ratio"] is None else f"{behaviour['length_ratio']:.2f}"
        rows.append([one.label, ended, ratio, f"{behaviour['mean_tokens']:.1f}", repeated, empty])
    return rows


@dataclass(frozen=True)
class CorrectionRow:
    """What correcting did to one metric. `better`, `same` and `worse` are shares of the answers in percent."""

    title: str
    change: IntervalDict
    better: float
    same: float
    worse: float
    improved: int
    worsened: int
    wrong_to_right: int
    right_to_wrong: int


def correction_rows(evaluation: Evaluation) -> list[CorrectionRow]:
    """A row for each metric; none if nothing was corrected."""
    found = evaluation.correction
    if found is None:
        return []
    total = len(evaluation.predictions) or evaluation.content["num_examples"]  # answers
    rows = []
    for name in evaluation.scores:
        improved, worsened = found["improved"][name], found["worsened"][name]
        better, worse = 100 * improved / total, 100 * worsened / total
        flips = found["wrong_to_right"][name], found["right_to_wrong"][name]
        same = 100 - better - worse
        rows.append(
            CorrectionRow(metric_title(name), found["change"][name], better, same, worse, improved, worsened, *flips)
        )
    return rows

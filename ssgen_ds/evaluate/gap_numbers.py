"""From the scores of each token to what `ssgen gap` reports: curves, bins by position, a summary, with intervals.

Means are over tokens: sums over examples divided by their tokens. Intervals are the 95 % percentiles over resamples of
the examples, each with all its tokens: tokens of one response are not independent. All numbers share the resamples, so
differences between rates and between models are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ssgen_ds.evaluate.gap_measure import GapSettings, Measurement, Scores
from ssgen_ds.evaluate.gap_options import FREE, GOLD
from ssgen_ds.metrics.intervals import CONFIDENCE, Interval

RESAMPLES = 2_000  # the ends of an interval then stray by a few percent of its width
_DIGITS = 6

Sums = tuple[np.ndarray, np.ndarray]  # for each example: a sum over its tokens, and the number of tokens


class Resamples:
    """How often each resample contains each example."""

    def __init__(self, num_examples: int) -> None:
        even = np.full(num_examples, 1 / num_examples)
        counts_RN = np.random.default_rng(0).multinomial(num_examples, even, size=RESAMPLES)
        self._counts_RN = counts_RN.astype(np.float64)

    def mean(self, sums_N: np.ndarray, tokens_N: np.ndarray) -> Interval:
        """Sum over sum. Resamples without a token are left out; the ends meet where one example has them all."""
        mean = float(sums_N.sum() / tokens_N.sum())
        with np.errstate(invalid="ignore"):
            means_R = (self._counts_RN @ sums_N) / (self._counts_RN @ tokens_N)
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(means_R, [tail, 100 - tail])
        return Interval(mean, float(low), float(high))


def gap_result(
    models: list[tuple[str, str]], measurements: list[Measurement], gold: list[list[int]], settings: GapSettings
) -> dict[str, Any]:
    """All numbers, ready for JSON.

    Args:
        models: the name of each and what the user gave; the others are compared with the first.
        measurements: one for each model, in the same order.
        gold: the gold tokens of each example.
    """
    names = [name for name, _ in models]
    resamples, pairs = Resamples(len(gold)), list(zip(names, measurements, strict=True))
    curves = [_curve(name, "own", item, item, gold, resamples) for name, item in pairs]
    curves += [_curve(name, names[0], item, measurements[0], gold, resamples) for name, item in pairs[1:]]
    return {
        "kind": "gap",
        "num_examples": len(gold),
        "num_tokens": sum(map(len, gold)),
        "rates": list(settings.rates),
        "sampling": {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p},
        "seed": settings.seed,
        "models": [{"name": name, "model": model} for name, model in models],
        "curves": curves,
        "by_position": [_by_position(name, rate, item, resamples) for name, item in pairs for rate in (GOLD, FREE)],
        "summary": [_summary(name, item, measurements[0], resamples) for name, item in pairs],
    }


def _nll(scores: Scores) -> float:
    return float(scores.nll_T.sum(dtype=np.float64))


def _hits(scores: Scores) -> float:
    return float(scores.hit_T.sum())


def _sums(scores: list[Scores], value: Callable[[Scores], float]) -> Sums:
    return np.array([value(item) for item in scores]), np.array([float(len(item.nll_T)) for item in scores])


def _curve(
    name: str,
    contexts: str,
    measured: Measurement,
    author: Measurement,
    gold: list[list[int]],
    resamples: Resamples,
) -> dict[str, Any]:
    """One model on the contexts of `author`: itself, or the first model."""
    scored = measured.own if author is measured else measured.shared
    return {
        "model": name,
        "contexts": contexts,
        "rates": list(scored),
        **_columns("nll", [resamples.mean(*_sums(scores, _nll)) for scores in scored.values()]),
        **_columns("accuracy", [resamples.mean(*_sums(scores, _hits)) for scores in scored.values()]),
        "sampled_share": [_rounded(share) for share in author.sampled_share.values()],
        "changed_share": [_rounded(_changed(context, gold)) for context in author.contexts.values()],
    }


def _changed(contexts: list[list[int]], gold: list[list[int]]) -> float:
    """The share of response tokens that differ from gold: a sampled token may equal the gold one."""
    pairs = [pair for texts in zip(contexts, gold, strict=True) for pair in zip(*texts, strict=True)]
    return sum(sampled != right for sampled, right in pairs) / len(pairs)


def _columns(name: str, intervals: list[Interval]) -> dict[str, list[float]]:
    return {
        name: [_rounded(item.mean) for item in intervals],
        f"{name}_low": [_rounded(item.low) for item in intervals],
        f"{name}_high": [_rounded(item.high) for item in intervals],
    }


def position_edges(longest: int) -> list[int]:
    """Bins of response positions, about half as wide as their begin: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., longest."""
    edges = [0, 1, 2, 3]
    while edges[-1] < longest:
        edges.append(2 * edges[-2])
    return [*(edge for edge in edges if edge < longest), longest]


def _by_position(name: str, rate: float, measured: Measurement, resamples: Resamples) -> dict[str, Any]:
    scores = measured.own[rate]
    edges = position_edges(max(len(item.nll_T) for item in scores))
    intervals, num_tokens = [], []
    for begin, end in pairwise(edges):
        part = [Scores(item.nll_T[begin:end], item.hit_T[begin:end]) for item in scores]
        sums_N, tokens_N = _sums(part, _nll)
        intervals.append(resamples.mean(sums_N, tokens_N))
        num_tokens.append(int(tokens_N.sum()))
    return {
        "model": name,
        "contexts": "own",
        "rate": rate,
        "begin": edges[:-1],
        "end": edges[1:],
        **_columns("nll", intervals),
        "num_tokens": num_tokens,
    }


def _summary(name: str, measured: Measurement, first: Measurement, resamples: Resamples) -> dict[str, Any]:
    """The two ends of the curves, the gap between them, and for all but the first how the gap has changed."""
    own, shared = measured.own, measured.shared
    nll_gold, tokens_N = _sums(own[GOLD], _nll)
    nll_free, nll_free_shared = (_sums(scored[FREE], _nll)[0] for scored in (own, shared))
    hits_gold, hits_free = (_sums(own[rate], _hits)[0] for rate in (GOLD, FREE))
    numbers = {
        "nll_gold": nll_gold,
        "nll_free": nll_free,
        "gap_nll": nll_free - nll_gold,
        "accuracy_gold": hits_gold,
        "accuracy_free": hits_free,
        "gap_accuracy": hits_gold - hits_free,
        "nll_free_shared": nll_free_shared,
        "gap_nll_shared": nll_free_shared - nll_gold,
    }
    if measured is not first:
        gap_first = _sums(first.own[FREE], _nll)[0] - _sums(first.own[GOLD], _nll)[0]
        numbers["change_gap_nll"] = numbers["gap_nll"] - gap_first
        numbers["change_gap_nll_shared"] = numbers["gap_nll_shared"] - gap_first
    row: dict[str, Any] = {"model": name}
    for key, sums_N in numbers.items():
        found = resamples.mean(sums_N, tokens_N)
        row |= {key: _rounded(found.mean), f"{key}_low": _rounded(found.low), f"{key}_high": _rounded(found.high)}
    return row


def _rounded(value: float) -> float:
    return round(value, _DIGITS)

"""How sure a mean is: bootstrap intervals over examples, and paired comparisons. SciPy does the resampling.

An interval is the 95 % percentile interval of the mean of 9,999 resamples of the examples (Efron & Tibshirani 1993).
A paired comparison resamples the differences of the same examples; its p-value is that of a sign-flip test, two-sided.
Both are seeded: the same scores give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9_999
_BATCH_VALUES = 10_000_000  # resampled values in memory at a time: 80 MB


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; they are the same where there is but one value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of b - a over the same examples, and the probability of one so far from 0 if the two were alike."""

    p_value: float
    wins: int  # examples in which b is higher
    ties: int
    losses: int


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean; one value for each example. Raises ValueError when there are none."""
    from scipy.stats import bootstrap

    array = _as_array(values)
    mean = float(array.mean())
    if np.ptp(array) == 0:  # nothing to resample
        return Interval(mean, mean, mean)
    result = bootstrap(
        (array,), np.mean, method="percentile", confidence_level=CONFIDENCE, n_resamples=RESAMPLES,
        batch=_batch(len(array)), rng=np.random.default_rng(0),
    )  # fmt: skip
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compare two values for each example, in the same order. Raises ValueError for no values or unequal numbers."""
    from scipy.stats import permutation_test

    if len(before) != len(after):
        raise ValueError(f"{len(before)} values against {len(after)}: a paired comparison needs the same examples")
    change = _as_array(after) - _as_array(before)
    found = interval(change)
    if not change.any():
        p_value = 1.0
    else:
        p_value = permutation_test(
            (change,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True,
            batch=_batch(len(change)), rng=np.random.default_rng(0),
        ).pvalue  # fmt: skip
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    return Difference(found.mean, found.low, found.high, float(p_value), wins, len(change) - wins - losses, losses)


def _as_array(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values: there is nothing to take a mean of")
    return array


def _batch(num_values: int) -> int:
    return max(1, _BATCH_VALUES // num_values)

"""Intervals and paired comparisons against what theory says they are."""

import numpy as np
import pytest
from scipy.stats import binom

from ssgen_ds.metrics.intervals import Difference, Interval, difference, interval


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    """Resampling 100 zeros and ones draws from Binomial(100, .3): its 2.5 and 97.5 % points, over 100."""
    found = interval([1.0] * 30 + [0.0] * 70)
    low, high = binom.ppf([0.025, 0.975], 100, 0.3) / 100
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.011), pytest.approx(high, abs=0.011))


def test_nothing_to_resample_is_a_point() -> None:
    assert interval([0.25] * 9) == interval([0.25]) == Interval(0.25, 0.25, 0.25)


def test_the_same_scores_give_the_same_interval() -> None:
    scores = np.random.default_rng(3).random(50)
    assert interval(scores) == interval(list(scores))


def test_a_difference_counts_and_flips_signs() -> None:
    """Of the 8 sign patterns of (1, 1, 1), two are as far from 0 as it: p = 2/8."""
    assert difference([0, 0, 0], [1, 1, 1]) == Difference(1, 1, 1, 0.25, 3, 0, 0)
    mixed = difference([0.5, 0.5, 0.5, 0.5], [0.75, 0.5, 0.25, 0.75])
    assert (mixed.mean, mixed.wins, mixed.ties, mixed.losses) == (0.0625, 2, 1, 1)


def test_a_difference_is_paired() -> None:
    """The scores differ far more between examples than the two sides do: unpaired, the interval would hold 0."""
    before = np.random.default_rng(0).random(200)
    found = difference(before, before + 0.01 + 0.01 * np.sin(np.arange(200)))
    assert 0.008 < found.low < found.mean < found.high < 0.012
    assert found.p_value < 0.001
    unpaired = interval(before)
    assert unpaired.high - unpaired.low > 0.05


def test_no_change_is_certain() -> None:
    assert difference([0.1, 0.9], [0.1, 0.9]) == Difference(0, 0, 0, 1.0, 0, 2, 0)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 2.0])])
def test_nothing_to_compare_is_an_error(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match=r"nothing|same examples"):
        difference(before, after)

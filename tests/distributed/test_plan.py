"""`ssgen plan` against what torch allocates in real training, on one process and on two ranks."""

import pytest

from tests.distributed.plan_cases import SETTINGS

# ZeRO-3 on several ranks is left out: what it gathers is let go on threads that the profiler does not see, so that the
# tally never comes down.
CASES = [(name, ranks) for name in SETTINGS for ranks in (1, 2) if ranks == 1 or "zero3" not in name]


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_the_peak_is_planned_within_15_percent(run_cases, name, ranks):
    result = run_cases("tests.distributed.plan_cases", ranks)[name]
    assert result["planned"] == pytest.approx(result["measured"], rel=0.15)

"""`ssgen plan` against what torch allocates in real training, on one process and on two ranks."""

import pytest

from tests.distributed.plan_cases import SETTINGS


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_planned_within_15_percent(run_cases, name, ranks):
    result = run_cases("tests.distributed.plan_cases", ranks)[name]
    assert result["planned"] == pytest.approx(result["measured"], rel=0.15)

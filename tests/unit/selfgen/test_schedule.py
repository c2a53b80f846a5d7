import pytest

from ssgen_ds.selfgen.schedule import mix_rate_at


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [0.4, 0.4, 0.4]),
        ("linear", [0.0, 0.2, 0.4]),
        ("cosine", [0.0, 0.2, 0.4]),
        ("inverse_sigmoid", [0.0, 0.2, 0.4]),
    ],
)
def test_start_middle_end(schedule, values):
    assert [mix_rate_at(step, 101, 0.4, schedule) for step in (0, 50, 100)] == pytest.approx(values)


@pytest.mark.parametrize(("schedule", "quarter"), [("cosine", 0.14645 * 0.4), ("inverse_sigmoid", 0.07009 * 0.4)])
def test_shape(schedule, quarter):
    """cosine: (1 - cos(pi/4)) / 2; inverse sigmoid: (s(-2.5) - s(-5)) / (s(5) - s(-5))."""
    assert mix_rate_at(25, 101, 0.4, schedule) == pytest.approx(quarter, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sigmoid"])
def test_grows_and_never_exceeds_the_peak(schedule):
    rates = [mix_rate_at(step, 37, 0.3, schedule) for step in range(37)]
    assert rates == sorted(rates)
    assert max(rates) <= 0.3
    assert mix_rate_at(0, 1, 0.3, schedule) == pytest.approx(0.3)

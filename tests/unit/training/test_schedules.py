import pytest

from ssgen_ds.training.schedules import learning_rate_at, mix_rate_at


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
    assert [mix_rate_at(step, 101, 0.4, schedule) for step in (1, 51, 101)] == pytest.approx(values)


@pytest.mark.parametrize(("schedule", "quarter"), [("cosine", 0.14645 * 0.4), ("inverse_sigmoid", 0.07009 * 0.4)])
def test_shape(schedule, quarter):
    """cosine: (1 - cos(pi/4)) / 2; inverse sigmoid: (s(-2.5) - s(-5)) / (s(5) - s(-5))."""
    assert mix_rate_at(26, 101, 0.4, schedule) == pytest.approx(quarter, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sigmoid"])
def test_grows_and_never_exceeds_the_peak(schedule):
    rates = [mix_rate_at(step, 37, 0.3, schedule) for step in range(1, 38)]
    assert rates == sorted(rates)
    assert max(rates) <= 0.3
    assert mix_rate_at(1, 1, 0.3, schedule) == pytest.approx(0.3)


def test_learning_rates():
    def rates(schedule, warmup):
        return [learning_rate_at(step, 10, 1.0, schedule, warmup) for step in range(1, 11)]

    assert rates("constant", 0) == [1.0] * 10
    assert rates("constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", 0.2) == pytest.approx([0.5, 1.0, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = rates("cosine", 0)
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)

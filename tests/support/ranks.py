"""Tests whose bodies run on real ranks.

    @ranks(2)
    def test_the_sum_is_over_all(world):
        assert world.sum(1) == [2]

The body runs on two ranks at once, each in a process of its own, joined by gloo. With `@ranks(1, 2)` it runs in one
process, and then again on two ranks. All tests that run on the same number of ranks share one start of the ranks.
Fixtures run on the ranks, too. Besides pytest's own there are:

    world     the `World` of the rank
    folder    tiny models and data, and room for runs; the same folder for all ranks and all modules
    kept      a dictionary; what rank 0 puts there is what the test finds when it runs on its next number of ranks

A test fails when it fails on any rank. It also fails when a rank dies or does not answer in time; then the rest of its
module fails with it on so many ranks, and the next module gets new ranks. All ranks run the same tests in the same
order: who skips or fails early must do so on all ranks, or the others wait for it in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_pool import RankPool, RanksLost, Reports

ranks = pytest.mark.ranks


def on_each(*numbers: int) -> pytest.MarkDecorator:
    """One test for each of these numbers of ranks, which do not know of each other; the test has an argument `size`."""
    return pytest.mark.parametrize("size", [pytest.param(number, marks=ranks(number)) for number in numbers])


def numbers_of(item: pytest.Item) -> tuple[int, ...]:
    """The numbers of ranks that a test runs on, in order; none if it is an ordinary test."""
    marker = item.get_closest_marker("ranks")
    return marker.args if marker else ()


class RanksPlugin:
    """Runs the tests that are marked with `ranks`, and leaves the others to pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._folder: Path | None = None
        self._pools: dict[int, RankPool] = {}  # by the number of ranks

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if numbers_of(item):
                item.add_marker(pytest.mark.timeout(0))  # there is one limit for the ranks, see `rank_pool`

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not numbers_of(item):
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item):
            hook.pytest_runtest_logreport(report=report)
        # An ordinary test before this one has left open what it shared with this one, by the rules of pytest. Close
        # what the next one does not need, as pytest does after each test that it runs itself.
        item.session._setupstate.teardown_exact(nextitem)  # type: ignore[attr-defined]
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_keyboard_interrupt(self) -> None:
        for pool in self._pools.values():
            pool.kill()

    def pytest_unconfigure(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Setup, call and teardown: of the first number of ranks on which something is wrong, else of the last."""
        seconds: dict[str, float] = {}
        for number in numbers_of(item):
            try:
                by_rank = self._pool(item, number).run(item, self._next_on(item, number))
                chosen = [self._merged(phase, number) for phase in by_phase(by_rank)]
            except RanksLost as lost:
                return lost_reports(item, f"on {number} rank{'s' * (number > 1)}: {lost}")
            for report in chosen:
                seconds[report.when] = report.duration = seconds.get(report.when, 0.0) + report.duration
            if any(not report.passed for report in chosen):
                break
        return chosen

    def _pool(self, item: pytest.Item, number: int) -> RankPool:
        pool = self._pools.get(number)
        if pool is None or pool.lost_in not in (None, item.path):
            paths = dict.fromkeys(one.path for one in item.session.items if number in numbers_of(one))
            pool = self._pools[number] = RankPool(number, list(paths), self._inputs(), self._config)
        return pool

    def _inputs(self) -> Path:
        if self._folder is None:
            from tests.support.tiny_runs import make_inputs  # late: it needs torch, and most tests do not

            self._folder = self._config._tmp_path_factory.mktemp("ranks")  # type: ignore[attr-defined]
            with redirect_stderr(StringIO()):  # a progress bar
                make_inputs(self._folder)
        return self._folder

    @staticmethod
    def _next_on(item: pytest.Item, number: int) -> str | None:
        """The test that these ranks will run after this one: pytest keeps the fixtures that both use."""
        items = item.session.items
        rest = items[items.index(item) + 1 :]
        return next((one.nodeid for one in rest if number in numbers_of(one)), None)

    def _merged(self, phase: list[dict[str, Any]], number: int) -> pytest.TestReport:
        """The worst of the ranks' reports of one phase, the first rank's among equals, with the rank's name."""
        order = ("failed", "skipped", "passed")
        rank = min(range(number), key=lambda rank: order.index(phase[rank]["outcome"]))
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=phase[rank])
        if report.failed and number > 1:
            others = ", ".join(f"rank {i} {one['outcome']}" for i, one in enumerate(phase) if i != rank)
            report.sections.insert(0, (f"rank {rank} of {number}", f"This is what rank {rank} says; {others}."))
        return report


def by_phase(by_rank: list[Reports]) -> Iterator[list[dict[str, Any]]]:
    """[rank][phase] to [phase][rank]. A rank whose setup failed or was skipped has no call, and has the last word."""
    for when in ("setup", "call", "teardown"):
        phase = [next((report for report in reports if report["when"] == when), None) for reports in by_rank]
        if all(phase):
            yield phase


def lost_reports(item: pytest.Item, reason: str) -> list[pytest.TestReport]:
    """A test whose ranks are gone has failed."""
    keywords = dict.fromkeys(item.keywords, 1)
    return [
        pytest.TestReport(item.nodeid, item.location, keywords, outcome, text, when)
        for outcome, text, when in (("failed", reason, "call"), ("passed", None, "teardown"))
    ]

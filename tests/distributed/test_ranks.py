"""Tests on ranks: each is reported by its name, whatever happens to the ranks."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.launch import run


def outcome_of(sample: str, *options: str) -> tuple[dict[str, str], str]:
    """The outcome of each test of a sample, and all that pytest says."""
    file = str(Path("tests/support") / sample)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", file, *options]
    text = run(command, timeout=400).stdout
    found = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL) \S+?::(\S+)", text, re.MULTILINE)
    return {name: outcome for outcome, name in found}, text


@pytest.fixture(scope="module")
def verdicts() -> tuple[dict[str, str], str]:
    return outcome_of("ranks_sample.py")


def test_each_test_has_its_outcome(verdicts):
    outcomes, text = verdicts
    assert outcomes == {
        "test_passes": "PASSED",
        "test_fails_on_rank_1": "FAILED",
        "test_a_fixture_of_the_module_lasts": "PASSED",
        "test_fails_as_expected": "XFAIL",
        "test_keeps_for_two_ranks_what_one_has_found[7]": "PASSED",
        "test_keeps_for_two_ranks_what_one_has_found[8]": "PASSED",
        "test_fails_before_its_last_number": "FAILED",
        "test_runs_on[1]": "PASSED",
        "test_runs_on[2]": "PASSED",
        "test_is_an_ordinary_one": "PASSED",
    }
    assert re.search(r"SKIPPED \[1\] tests/support/ranks_sample.py:\d+: no need", text)


def test_a_failure_is_shown_with_its_rank_and_what_that_has_written(verdicts):
    _, text = verdicts
    assert "AssertionError: on purpose" in text and "This is what rank 1 says; rank 0 passed." in text
    assert "a word of rank 1" in text and "a word of rank 0" not in text
    assert "AssertionError: not here" in text


def test_one_is_chosen_by_its_name():
    outcomes, text = outcome_of("ranks_sample.py::test_runs_on", "-k", "1")
    assert outcomes == {"test_runs_on[1]": "PASSED"}, text


def test_an_ordinary_test_may_come_from_another_folder_than_the_ranks_before_it():
    """pytest has kept the folder of the first one open for the test on ranks, which pytest itself does not run."""
    on_ranks, elsewhere = "tests/support/ranks_sample.py::test_runs_on[1]", "tests/unit/selfgen/test_rac.py"
    outcomes, text = outcome_of("ranks_sample.py::test_is_an_ordinary_one", on_ranks, elsewhere)
    assert outcomes.pop("test_is_an_ordinary_one") == outcomes.pop("test_runs_on[1]") == "PASSED", text
    assert len(outcomes) > 1 and set(outcomes.values()) == {"PASSED"}, text


def test_lost_ranks_fail_their_own_test_and_those_that_they_have_not_run():
    outcomes, text = outcome_of("ranks_sample_lost.py", "-o", "ranks_seconds=15")
    assert outcomes == {
        "test_before": "PASSED",
        "test_rank_1_dies": "FAILED",
        "test_after": "FAILED",
        "test_with_other_ranks": "PASSED",
        "test_hangs": "FAILED",
    }
    assert "on 2 ranks: rank 1 ended with 3 before it answered" in text
    assert "not run: the ranks were lost in tests/support/ranks_sample_lost.py::test_rank_1_dies" in text
    assert "on 1 rank: no answer in time from rank 0" in text
    assert re.search(r'File ".*ranks_sample_lost.py", line \d+ in test_hangs', text)
    assert not [command for command in commands() if b"rank_worker" in command and b"ranks_sample_lost" in command]


def commands() -> list[bytes]:
    """Command lines of all processes that run now."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(file.read_bytes())
    return found

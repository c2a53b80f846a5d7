"""Earlier visits, from real round files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssgen_ds.run.layout import round_path
from ssgen_ds.selfgen.generated import Draft, Generated
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.round_file import write_round


@dataclass
class Rank:
    """One rank of a world: what rank 0 broadcasts reaches the others through `box`."""

    is_main: bool
    box: list

    def broadcast(self, item):
        if self.is_main:
            self.box.append(item)
        return self.box[-1]


def visit(example_id: str, number: int, step: int = 0) -> Generated:
    """A record that can be told apart by its draft."""
    return Generated(step, example_id, number, 0.1, [1, 2], draft=Draft([number, step], 2, 2))


def write(run_dir: Path, number: int, *records: Generated) -> None:
    write_round(round_path(run_dir, number), list(records))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Two epochs of a and b, and c once, in rounds of two steps."""
    write(tmp_path, 1, visit("a", 0, step=0), visit("b", 0, step=1))
    write(tmp_path, 2, visit("c", 0, step=2), visit("b", 1, step=3))
    write(tmp_path, 3, visit("a", 1, step=4))
    return tmp_path


def drafts(found: dict[str, Generated]) -> dict[str, list[int]]:
    return {example_id: record.draft.ids for example_id, record in found.items()}


def test_the_latest_visit_before_the_round(run_dir):
    history = History(run_dir, Rank(True, []))
    assert history.before(1, ["a", "b"]) == {}
    assert drafts(history.before(2, ["c", "b"])) == {"b": [0, 1]}
    assert drafts(history.before(3, ["a"])) == {"a": [0, 0]}
    assert drafts(history.before(4, ["a", "b", "c", "d", "a"])) == {"a": [1, 4], "b": [1, 3], "c": [0, 2]}
    assert history.before(4, ["c"])["c"] == visit("c", 0, step=2), "the whole record"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_restart_sees_what_the_uninterrupted_run_saw(run_dir, number):
    """Whatever round it starts from, and although rounds of an abandoned continuation lie there."""
    whole = History(run_dir, Rank(True, []))
    for earlier in range(1, number):
        whole.before(earlier, ["a"])
    expected = whole.before(number, ["a", "b", "c"])
    for later in range(number, 6):
        write(run_dir, later, *[visit(example_id, 9, step=99) for example_id in "abc"])
    assert History(run_dir, Rank(True, [])).before(number, ["a", "b", "c"]) == expected


def test_rounds_written_meanwhile_are_seen(run_dir):
    history = History(run_dir, Rank(True, []))
    history.before(4, [])
    write(run_dir, 4, visit("c", 1, step=6))
    assert drafts(history.before(5, ["c"])) == {"c": [1, 6]}


def test_an_example_twice_in_a_round_is_its_later_visit(tmp_path):
    write(tmp_path, 1, visit("a", 0, step=0), visit("a", 1, step=1))
    assert drafts(History(tmp_path, Rank(True, [])).before(2, ["a"])) == {"a": [1, 1]}


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "not parquet"])
def test_an_unreadable_round_is_one_warning(run_dir, damage, caplog):
    path = round_path(run_dir, 2)
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "not parquet": b"x" * 99}[damage])
    with caplog.at_level(logging.WARNING):
        history = History(run_dir, Rank(True, []))
        assert drafts(history.before(4, ["a", "b", "c"])) == {"a": [1, 4], "b": [0, 1]}
        round_path(run_dir, 1).unlink()  # after it was indexed
        assert drafts(history.before(4, ["a", "b", "c"])) == {"a": [1, 4], "b": [0, 1]}, "it is read once"
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


def test_only_rank_0_reads(run_dir, caplog):
    box: list = []
    expected = History(run_dir, Rank(True, box)).before(4, ["a", "b"])
    assert History(run_dir / "not-here", Rank(False, box)).before(4, ["a", "b"]) == expected
    assert expected.keys() == {"a", "b"}
    assert not caplog.records, "it would have missed the files"

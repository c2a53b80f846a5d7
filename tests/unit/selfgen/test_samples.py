"""The record of texts: appended to, cut back after a resume, whole after a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssgen_ds.data.tokenize import Example
from ssgen_ds.report.read_run import read_samples
from ssgen_ds.selfgen.generated import Generated, Slot
from ssgen_ds.selfgen.samples import PER_ROUND, describe_records


@dataclass
class Words:
    """Shows ids as words, as many bytes each as wanted."""

    width: int = 1

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token).zfill(self.width) for token in ids)


def describe(run_dir: Path, number: int, name: str = "x", count: int = 6, chat: Words | None = None) -> None:
    (run_dir / "selfgen").mkdir(exist_ok=True)
    slots = [Slot(number, Example(f"{name}{i}", [1, i], None, [2], False, "r"), 0, 0.1) for i in range(count)]
    records = [Generated(slot.step, slot.example.id, 0, 0.1, [2]) for slot in slots]
    describe_records(run_dir, number, slots, records, chat or Words())


def written(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "selfgen" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["round"], row["example_id"]) for row in map(json.loads, lines)]


def test_the_last_records_of_each_round(tmp_path):
    for number in (1, 2):
        describe(tmp_path, number)
    assert written(tmp_path) == [(number, f"x{i}") for number in (1, 2) for i in range(2, 2 + PER_ROUND)]


@pytest.mark.parametrize("width", [1, 40_000], ids=["short", "lines longer than a block"])
def test_a_resume_replaces_the_rounds_from_there_on(tmp_path, width):
    for number in (1, 2, 3):
        describe(tmp_path, number, "old", 2, Words(width))
    describe(tmp_path, 2, "new", 2, Words(width))
    assert written(tmp_path) == [(1, "old0"), (1, "old1"), (2, "new0"), (2, "new1")]
    describe(tmp_path, 1, "first", 1)
    assert written(tmp_path) == [(1, "first0")]


@pytest.mark.parametrize("tail", [b'{"round": 1, "st', b"\0" * 50_000, b"[]\n", b"\xff\n", b'{"step": 1}\n', b"\n\n"])
def test_a_damaged_end_is_dropped(tmp_path, tail):
    describe(tmp_path, 1, "a", 1)
    with (tmp_path / "selfgen" / "samples.jsonl").open("ab") as file:
        file.write(tail)
    describe(tmp_path, 2, "b", 1)
    assert written(tmp_path) == [(1, "a0"), (2, "b0")]


def test_the_report_reads_some_of_very_many_rounds(tmp_path):
    for number in range(1, 60):
        describe(tmp_path, number, count=2)
    path = tmp_path / "selfgen" / "samples.jsonl"
    rows = read_samples(path, most_rounds=8)
    rounds = sorted({row["round"] for row in rows})
    assert rounds == [1, 9, 17, 25, 33, 41, 49, 57, 59]
    assert len(rows) == 2 * len(rounds), "whole rounds"
    assert len(read_samples(path)) == 2 * 59
    assert read_samples(tmp_path / "none.jsonl") == []

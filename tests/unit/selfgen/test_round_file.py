"""A round on disk is the round in memory."""

from __future__ import annotations

import os

import pyarrow.parquet as pq

from ssgen_ds.sampler.free import FreeSample
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Target
from ssgen_ds.selfgen.round_file import read_round, write_round


def test_rounds_survive_the_disk(tmp_path):
    records = [
        Generated(
            step=4,
            example_id="a",
            visit=1,
            mix_rate=0.25,
            gold_ids=[1, 2, 3],
            mixed=Mixed([True, False, False], [9, 2, 3], 2),
            draft=Draft([7, 8], stop_id=2, kept=1),
            rewrite=FreeSample([6], stop_id=None),
            target=Target([1, 2, 3], "reference"),
        ),
        Generated(5, "b", 0, 0.0, [4]),
        Generated(5, "c", 0, 0.1, [4], draft=Draft([], None, 0)),
    ]
    path = tmp_path / "selfgen" / "round-00001.parquet"
    write_round(path, records)
    assert read_round(path) == records
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    steps = pq.read_table(path)["step"].to_pylist()
    assert steps == [3, 4, 4], "in the file they count from 0: runs of the first release go on"


def test_a_round_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events, sync, replace_file = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: events.append(os.readlink(f"/proc/self/fd/{number}")) or sync(number)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(str(new)) or replace_file(old, new))
    path = tmp_path / "round-00001.parquet"
    write_round(path, [])
    assert events == [str(path.with_suffix(".partial")), str(path)]

"""What was tokenised is kept: a start that was cut short goes on, and gives what one start gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssgen_ds.data import parts
from ssgen_ds.data.store import build_store
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import data_config


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 10)
    monkeypatch.setattr(parts, "MOST_THREADS", 1)


class Cut(BaseException):
    """A kill: nothing may catch it."""


class Counting(ChatFormat):
    """Counts the rows that it tokenises, and is cut short at one."""

    rows, cut_at = 0, -1

    def encode(self, record):
        if self.rows == self.cut_at:
            raise Cut
        self.rows += 1
        return super().encode(record)


@pytest.fixture
def sources(write_jsonl) -> list[Path]:
    """25 and 35 rows; a bad one, one that is too long, and equal ones among them."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i % 3}"} for i in range(35)]
    rows[3] = {"prompt": "q", "completion": ""}
    rows[14] = {"prompt": "q" * 99, "completion": "a"}
    rows[20] = rows[5]
    return [write_jsonl(rows[:25], "one.jsonl"), write_jsonl(rows, "two.jsonl")]


SETTINGS = {"on_bad_row": "skip", "over_length": "skip", "max_prompt_tokens": 60}


def contents(store) -> tuple:
    skipped = (store.folder / "skipped.txt").read_bytes()
    return list(store), [store.where(i) for i in range(len(store))], store.summary, skipped


@pytest.mark.parametrize("cut_at", [0, 5, 9, 19, 30, 40, 55])
def test_a_start_that_was_cut_short_goes_on(chatml, sources, tmp_path, cut_at) -> None:
    data = data_config(*sources, **SETTINGS)
    whole = build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "whole")
    chat = Counting(chatml, data)
    chat.cut_at = cut_at
    with pytest.raises(Cut):
        build_store(data.train, data, chat, tmp_path / "cache")
    again = Counting(chatml, data)
    store = build_store(data.train, data, again, tmp_path / "cache")
    assert contents(store) == contents(whole)
    assert again.rows <= 58 - max(0, cut_at - 15), "all but the part it was in, and the short end of a source"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store.folder.name]


@pytest.mark.parametrize("damage", [b"", b"x" * 500, None])
def test_a_damaged_part_is_made_again(chatml, sources, tmp_path, damage) -> None:
    data = data_config(*sources, **SETTINGS)
    whole = build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "whole")
    chat = Counting(chatml, data)
    chat.cut_at = 40
    with pytest.raises(Cut):
        build_store(data.train, data, chat, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob(".parts-*/*.arrow"))
    assert [file.name for file in files] == ["0-00000.arrow", "0-00001.arrow", "1-00000.arrow"]
    files[1].write_bytes(files[1].read_bytes()[:-9] if damage is None else damage)
    assert contents(build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")) == contents(whole)


def test_refused_data_leaves_nothing(chatml, sources, tmp_path) -> None:
    data = data_config(*sources)
    with pytest.raises(UserError, match=r"two\.jsonl:4: the response is empty"):
        build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_nobody_takes_up_goes(chatml, sources, tmp_path) -> None:
    data = data_config(*sources, **SETTINGS)
    for name in (".parts-old", ".store-old.1", ".parts-new"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        if "old" in name:
            os.utime(tmp_path / "cache" / name, (1, 1))
    build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".parts-new"]


def test_every_row_is_a_sign_of_life(chatml, sources, tmp_path) -> None:
    data = data_config(*sources, **SETTINGS)
    ticks: list[None] = []
    build_store(data.train, data, ChatFormat(chatml, data), tmp_path, tick=lambda: ticks.append(None))
    assert len(ticks) >= 60


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    for name, number in {"PART_ROWS": 1000, "GROUP_ROWS": 3, "GROUPS_AHEAD": 5, "MOST_THREADS": 8}.items():
        monkeypatch.setattr(parts, name, number)


def test_threads_give_what_one_gives_in_order(chatml, sources, write_jsonl, tmp_path, request) -> None:
    many = [{"prompt": f"q{i} " * (1 + i % 9), "completion": f"a{i}"} for i in range(1500)]
    data = data_config(*sources, write_jsonl(many, "many.jsonl"), **SETTINGS)
    one = build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "one")
    request.getfixturevalue("four_threads")
    store = build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "four")
    assert contents(store) == contents(one)


def test_errors_of_threads_have_their_place(chatml, plain, sources, write_jsonl, tmp_path, four_threads) -> None:
    data = data_config(*sources)
    with pytest.raises(UserError, match="2 bad rows") as caught:
        build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")
    places = [line.split(": ")[0].rpartition("/")[2] for line in str(caught.value).splitlines()[1:]]
    assert places == ["one.jsonl:4", "two.jsonl:4"]
    turns = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}
    short = [{"messages": [turn | {"content": str(i)} for turn in turns["messages"][:2]]} for i in range(60)]
    mixed = data_config(write_jsonl([*short, turns, *short, turns]))
    with pytest.raises(UserError, match=r"train\.jsonl:61: the tokenizer has no chat template"):
        build_store(mixed.train, mixed, ChatFormat(plain, mixed), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

"""JSON and CSV as people have them: what rows they give, at which lines, and what is wrong with the others."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.data.text_files import DELIMITERS
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import rows


def test_jsonl_places_and_damage(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "x\xe2\x80\xa8y"}\n{"a": \xff}\n[1]\n{oops\n{"a": 2}')
    found = rows(file)
    assert found[0] == ("t.jsonl:1", {"a": 1})
    assert found[1] == ("t.jsonl:3", {"a": "x\u2028y"})  # U+2028 ends no line
    assert found[2] == ("t.jsonl:4", "not UTF-8 (byte 6)")
    assert found[3] == ("t.jsonl:5", "expected an object with columns, got list")
    assert found[4][0] == "t.jsonl:6" and found[4][1].startswith("not valid JSON")
    assert found[5] == ("t.jsonl:7", {"a": 2})
    file.write_text("[" * 200_000)
    assert rows(file)[0][1].startswith("not valid JSON")


def test_json_array_object_and_neither(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    for content in ([{"a": 1}, {"a": 2}], {"version": 1, "data": [{"a": 1}, {"a": 2}]}):
        file.write_text(json.dumps(content))
        assert rows(file) == [("t.json: item 1", {"a": 1}), ("t.json: item 2", {"a": 2})]
    file.write_text('{"a": [1], "b": [2]}')
    ((where, what),) = rows(file)
    assert where == "t.json" and "expected an array" in what and "2 lists: write it row by row" in what
    file.write_text("3")
    assert rows(file) == [("t.json", "expected an array of objects, got int")]


def test_csv_names_the_line_a_row_starts_on(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b'q,a\r\n"two\nlines",1\r\n\r\nx\r\n\xffy,2\r\nz,"3"\r\n')
    assert rows(file) == [
        ("t.csv:2", {"q": "two\nlines", "a": "1"}),
        ("t.csv:5", "1 cells, but the header names 2 columns"),
        ("t.csv:6", "not UTF-8"),
        ("t.csv:7", {"q": "z", "a": "3"}),
    ]


def test_csv_cell_above_the_default_limit(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("q\n" + "x" * 200_000 + "\n")
    assert len(rows(file)[0][1]["q"]) == 200_000


LINES = b'{"a": 1}\n{"a": 2}\n'


def test_what_a_json_file_holds_counts_not_its_name(tmp_path: Path) -> None:
    lines, array = tmp_path / "t.json", tmp_path / "t.jsonl"
    lines.write_bytes(LINES)
    assert rows(lines) == [("t.json:1", {"a": 1}), ("t.json:2", {"a": 2})]
    array.write_text('\n[{"a": 1},\n{"a": 2}]')
    assert rows(array) == [("t.jsonl: item 1", {"a": 1}), ("t.jsonl: item 2", {"a": 2})]
    for file in (lines, array):
        file.write_bytes(LINES.decode().encode("utf-16"))
        assert [row for _, row in rows(file)] == [{"a": 1}, {"a": 2}]
    array.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="begins like UTF-16, but is not"):
        rows(array)


@pytest.mark.parametrize(
    "content",
    [
        b"q,a\nx,1\ny z,2\n",
        b' q, a\nx, 1\n"y z", 2\n',
        b'q;a\nx;1\n"y z";2\n',
        b"sep=;\r\nq;a\r\nx;1\r\ny z;2\r\n",
        b"q\ta\nx\t1\ny z\t2\n",
        b"q,a\rx,1\ry z,2\r",
        "q,a\nx,1\ny z,2\n".encode("utf-16"),
        b"\xef\xbb\xbfq,a\nx,1\ny z,2\n",
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.CSV"
    file.write_bytes(content)
    assert [row for _, row in rows(file)] == [{"q": "x", "a": "1"}, {"q": "y z", "a": "2"}]


def test_a_quote_never_swallows_rows_without_a_word(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('q,a\n"one,1\n"two",2\nthree,3\n')
    found = rows(file)
    assert found[0][0] == "t.csv:2" and "lines 2 to 3 are read as one row" in found[0][1]
    assert found[1:] == [("t.csv:4", {"q": "three", "a": "3"})]
    file.write_text('q,a\n"one,1\ntwo,2"\nthree,3\n')
    assert "1 cells, but the header names 2 columns (lines 2 to 3 are one row" in rows(file)[0][1]
    file.write_text('q,a\nzero,0\n"one,1\ntwo,2\n')
    with pytest.raises(UserError, match=r"t\.csv:3: a quote that opens in this row is never closed.*to line 4"):
        rows(file)


def test_a_key_or_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"a": 1, "a": 2}\n{"m": [{"b": 1, "b": 1}]}\n{"a": 3}')
    assert rows(file) == [
        ("t.jsonl:1", "the key 'a' stands twice in one object"),
        ("t.jsonl:2", "the key 'b' stands twice in one object"),
        ("t.jsonl:3", {"a": 3}),
    ]
    table = tmp_path / "t.csv"
    table.write_text("a,b,a \n1,2,3\n")
    with pytest.raises(UserError, match=r"t\.csv:1: the header names the column 'a' twice"):
        rows(table)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_object_in_one_line_is_a_row_in_jsonl_and_a_whole_file_in_json(tmp_path: Path, encoding: str) -> None:
    content = '{"version": 1, "data": [{"a": 1}]}\n'
    for name, expected in (
        ("t.jsonl", ("t.jsonl:1", {"version": 1, "data": [{"a": 1}]})),
        ("t.json", ("t.json: item 1", {"a": 1})),
    ):
        (tmp_path / name).write_text(content, encoding=encoding)
        assert rows(tmp_path / name) == [expected]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_first_line_that_is_wrong_costs_one_row_of_jsonl(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('\n{"a": \n{"a": 2}\n', encoding=encoding)
    (first, what), second = rows(file)
    assert first == "t.jsonl:2" and str(what).startswith("not valid JSON")
    assert second == ("t.jsonl:3", {"a": 2})


def test_where_the_rows_of_a_csv_file_begin(tmp_path: Path) -> None:
    """A line that names what separates cells and blank lines before the header count as lines."""
    file = tmp_path / "t.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("sep=|\n\nq|a\nx,y|1\n", encoding=encoding)
        assert rows(file) == [("t.csv:4", {"q": "x,y", "a": "1"})]
    file.write_text('"q, in short";a\nx;1\n')
    assert rows(file) == [("t.csv:2", {"q, in short": "x", "a": "1"})], "a comma in quotes separates nothing"
    for nothing in ("", "\n\n", "q,a\n"):
        file.write_text(nothing)
        assert rows(file) == []
    file.write_text('q,"a\nx,1\n')
    with pytest.raises(UserError, match=r"t\.csv:1: a quote that opens in this row is never closed"):
        rows(file)


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=4), st.sampled_from(DELIMITERS), st.sampled_from(["utf-8", "utf-16"]))
def test_what_is_written_as_csv_or_as_lines_is_read_back(tmp_path_factory, cells, delimiter, encoding) -> None:
    folder = tmp_path_factory.mktemp("texts")
    expected = [{"q": question, "a": answer} for question, answer in cells]
    with (folder / "t.csv").open("w", encoding=encoding, newline="") as table:
        csv.writer(table, delimiter=delimiter).writerows([("q", "a"), *cells])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected)
    (folder / "t.jsonl").write_text(lines, encoding=encoding, newline="")
    for name in ("t.csv", "t.jsonl"):
        assert [row for _, row in rows(folder / name)] == expected

"""Sources: where they are found, and that each row carries its exact place."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ssgen_ds.data.paths import resolve_package_path, resolve_path
from ssgen_ds.data.readers import BadRow, read_files
from ssgen_ds.errors import UserError


def rows(file: Path) -> list[tuple[str, object]]:
    """(place within the folder, row or the text of what is wrong)."""
    read = [(where.removeprefix(f"{file.parent}/"), row) for where, row in read_files([file])]
    return [(where, str(row) if isinstance(row, BadRow) else row) for where, row in read]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package that must not be imported."""
    folder = tmp_path / "site" / "explosive_package"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "sub" / "rows.jsonl").write_text("{}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "explosive_package"


def test_package_file_is_found_without_importing(package: str) -> None:
    found = resolve_package_path(f"package:{package}/sub/rows.jsonl")
    assert Path(found).read_text() == "{}\n"
    assert package not in sys.modules
    assert resolve_path(f"package:{package}/sub/*.jsonl") == [Path(found)]


def test_package_errors_name_the_fix(package: str) -> None:
    with pytest.raises(UserError, match="pip install --no-deps no_such_package"):
        resolve_package_path("package:no_such_package/rows.jsonl")
    with pytest.raises(UserError, match=r"did you mean .*sub/rows\.jsonl"):
        resolve_package_path(f"package:{package}/sub/row.jsonl")
    with pytest.raises(UserError, match="expected package:MODULE/relative/path"):
        resolve_package_path("package:json")


def test_folder_and_glob_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert resolve_path(str(tmp_path)) == [tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "deep/c.parquet"]
    assert resolve_path(f"{tmp_path}/*.jsonl") == [tmp_path / "b.jsonl"]


@pytest.mark.parametrize("hub_id", ["squad", "openai/gsm8k", "org/name-v1.5_x"])
def test_hub_ids(hub_id: str) -> None:
    assert resolve_path(hub_id) is None


def test_missing_files_are_not_taken_for_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"data\.eval: no such file: .*trian\.jsonl; did you mean .*/train\.jsonl\?"):
        resolve_path(str(tmp_path / "trian.jsonl"), "data.eval")
    for path in ("train2.jsonl", "data/x.parquet", "./squad", "a/b/c", "no_folder_here/x.json"):
        with pytest.raises(UserError, match="no such file"):
            resolve_path(path)
    with pytest.raises(UserError, match="no file matches"):
        resolve_path(str(tmp_path / "*.csv"))
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match="unknown format"):
        resolve_path(str(tmp_path / "x.txt"))


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


def test_parquet_rows_across_batches(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"n": list(range(600))}), file)
    found = rows(file)
    assert len(found) == 600
    assert found[599] == ("t.parquet: row 600", {"n": 599})
    file.write_bytes(b"no parquet at all")
    assert len(rows(file)) == 1
    assert rows(file)[0][0] == "t.parquet" and rows(file)[0][1].startswith("not readable as parquet")


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
    columns = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), columns)
    with pytest.raises(UserError, match="has the column 'a' twice"):
        rows(columns)


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


def test_null_keys_of_parquet_structs_are_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    message = {"role": "user", "content": "hi", "name": None, "calls": [{"f": "x", "g": None}, None]}
    pa.parquet.write_table(pa.table({"messages": [[message]], "note": pa.array([None], pa.string())}), file)
    wanted = {"role": "user", "content": "hi", "calls": [{"f": "x"}, None]}
    assert rows(file) == [("t.parquet: row 1", {"messages": [wanted], "note": None})]


def test_folders_as_people_have_them(tmp_path: Path) -> None:
    folder, other = tmp_path / "d", tmp_path / "other"
    for name in (
        "d/train.JSONL", "d/sub/b.Parquet", "d/._train.jsonl", "d/.ipynb_checkpoints/train-checkpoint.jsonl",
        "d/.cache/x.jsonl", "d/dataset_infos.json", "d/README.md", "other/c.csv",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (folder / "again.jsonl").symlink_to(folder / "train.JSONL")
    (folder / "linked").symlink_to(other)
    (folder / "sub" / "up").symlink_to(folder)
    wanted = [folder / "linked" / "c.csv", folder / "sub" / "b.Parquet", folder / "train.JSONL"]
    assert resolve_path(str(folder)) == wanted
    assert resolve_path(f"{tmp_path}/d*") == wanted  # a glob that matches a folder
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"gone\.jsonl: the link leads nowhere"):
        resolve_path(str(folder))
    (folder / "gone.jsonl").unlink()
    (folder / "part-2.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"part-2\.jsonl\.gz: looks like data, but \.gz is not read"):
        resolve_path(str(folder))
    for name in ("state.json", "dataset_info.json"):
        (other / name).touch()
    with pytest.raises(UserError, match=r"written by datasets' save_to_disk.*to_parquet"):
        resolve_path(str(other))

"""Sources: where they are found, and that each row carries its exact place."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ssgen_ds.data.paths import resolve_package_path, resolve_path
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import rows


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


def test_parquet_rows_across_batches(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"n": list(range(600))}), file)
    found = rows(file)
    assert len(found) == 600
    assert found[599] == ("t.parquet: row 600", {"n": 599})
    file.write_bytes(b"no parquet at all")
    assert len(rows(file)) == 1
    assert rows(file)[0][0] == "t.parquet" and rows(file)[0][1].startswith("not readable as parquet")


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    columns = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), columns)
    with pytest.raises(UserError, match="has the column 'a' twice"):
        rows(columns)


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

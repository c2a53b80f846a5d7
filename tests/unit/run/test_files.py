"""Whole or not at all."""

import errno
import os
import stat
from io import FileIO

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ssgen_ds.data.paths import new_folder
from ssgen_ds.run import files
from tests.support.damage import room_for


def test_text_replaces_the_old_only_when_it_is_all_there(tmp_path, monkeypatch):
    path = tmp_path / "finished.json"
    files.write_whole(path, "old")
    monkeypatch.setattr(files, "fsync", _no_room)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new, and longer")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["finished.json"]


def test_a_folder_takes_the_place_of_the_old_only_when_it_is_all_there(tmp_path):
    final = tmp_path / "model"
    for content in ("old", "new"):
        with files.whole_folder(final) as folder:
            (folder / content).write_text(content)
    assert os.listdir(final) == ["new"], "nothing of the old is left among the new"
    with pytest.raises(OSError, match=f"{final}: .*No space left"):
        _fill_the_disk(final)
    assert os.listdir(final) == ["new"] and os.listdir(tmp_path) == ["model"]


def test_what_a_killed_write_left_is_not_kept(tmp_path):
    (tmp_path / ".partial-model").mkdir()
    (tmp_path / ".partial-model" / "half").touch()
    with files.whole_folder(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert os.listdir(tmp_path / "model") == ["whole"]


def test_the_current_folder_can_be_written_to(tmp_path, monkeypatch):
    inner = tmp_path / "deep" / "out"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with files.whole_folder(files.Path(".")) as folder:
        (folder / "a").touch()
    assert os.listdir(inner) == ["a"]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_others_may_read_as_the_umask_says(tmp_path, umask, file_mode, folder_mode):
    """safetensors makes files that nobody else can read, and tempfile such folders."""
    before = os.umask(umask)
    try:
        with files.whole_folder(tmp_path / "model") as folder:
            save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "inner").mkdir()
            (folder / "inner" / "private.json").touch(mode=0o600)
        cache = new_folder(tmp_path, ".store-")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [cache, *tmp_path.rglob("*")]}
    assert modes.pop("model.safetensors") == modes.pop("private.json") == file_mode
    assert set(modes.values()) == {folder_mode} and len(modes) == 3


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and what is renamed, in order."""
    events: list[tuple[str, str]] = []
    for name in ("rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda old, new, real=real: events.append(("rename", str(new))) or real(old, new))
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: events.append(("sync", os.readlink(f"/proc/self/fd/{number}"))) or sync(number)
    )
    return events


def test_text_is_on_the_disk_before_it_takes_its_name(tmp_path, disk):
    files.write_whole(tmp_path / "best.json", "{}")
    assert disk == [("sync", str(tmp_path / ".partial-best.json")), ("rename", str(tmp_path / "best.json"))]


def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, disk):
    """Every file, every folder of names, and at last the name itself."""
    partial = tmp_path / ".partial-model"
    (partial / "inner").mkdir(parents=True)
    for name in ("config.json", "inner/weights"):
        (partial / name).write_text(name)
    files.publish(partial, tmp_path / "model")
    renamed = disk.index(("rename", str(tmp_path / "model")))
    assert {name for kind, name in disk[:renamed] if kind == "sync"} >= {str(partial), str(partial / "config.json")} | {
        str(partial / "inner"),
        str(partial / "inner" / "weights"),
    }
    assert disk[renamed + 1 :] == [("sync", str(tmp_path))]


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    """The kernel has taken half of it already when it says that there is no more room."""
    path = tmp_path / "metrics.jsonl"
    files.append_whole(path, "first\n")
    with room_for(20), pytest.raises(OSError, match=rf"File too large: '{path}'"):
        files.append_whole(path, "second" * 5 + "\n")
    assert path.read_text() == "first\n"
    files.append_whole(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_no_empty_file_is_left_of_a_first_line(tmp_path):
    for size in (0, 20):
        with room_for(size), pytest.raises(OSError, match="File too large"):
            files.append_whole(tmp_path / "metrics.jsonl", "x" * 30)
        assert os.listdir(tmp_path) == []


def test_a_disk_that_takes_less_than_it_is_given_gets_the_rest(tmp_path):
    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:3])

    with Slow(tmp_path / "f", "a") as stream:
        files.write_or_undo(stream, b"12345678")
    assert (tmp_path / "f").read_bytes() == b"12345678"


@pytest.mark.parametrize("write", [files.write_whole, files.append_whole])
def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "fsync", lambda number: _no_room(number))
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'f.json'}'"):
        write(tmp_path / "f.json", "{}")


def _fill_the_disk(final):
    with files.whole_folder(final) as folder:
        (folder / "newest").write_text("half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def _no_room(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""Whole or not at all."""

import errno
import os

import pytest
from safetensors import SafetensorError

from ssgen_ds import files


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


def _fill_the_disk(final):
    with files.whole_folder(final) as folder:
        (folder / "newest").write_text("half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def _no_room(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""What makes a checkpoint complete, in which order, and which ones go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ssgen_ds.checkpoint import save as checkpoint
from ssgen_ds.checkpoint.save import TrainState, complete_checkpoints
from ssgen_ds.checkpoint.shard_file import FileEntry
from ssgen_ds.run.layout import INDEX, MARKER, RECIPE_FILE, STATE, checkpoint_dir

SHARD = "shard-00000-of-00001.safetensors"


def publish(run_dir: Path, step: int) -> Path:
    """A whole checkpoint with a shard of four bytes."""
    final = checkpoint_dir(run_dir, step)
    partial = final.with_name(f".partial-{final.name}")
    partial.mkdir(parents=True)
    (run_dir / RECIPE_FILE).write_text("a: 1\n")
    (partial / SHARD).write_bytes(b"abcd")
    state = TrainState(step, 1, "data", "tokenizer", 1, 0, {})
    shards = {SHARD: FileEntry.of(partial / SHARD)}
    checkpoint._publish(partial, final, run_dir, state, None, shards)
    return final


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in complete_checkpoints(run_dir))


def test_a_checkpoint_is_whole_and_its_marker_was_the_last(tmp_path, monkeypatch):
    """When the marker is written the index is there and whole, and with it every file that the index names."""
    found = []
    write_text = Path.write_text

    def look(path: Path, text: str, *arguments, **named) -> int:
        if path.name == MARKER:
            entries = json.loads((path.parent / INDEX).read_text("utf-8"))["files"]
            found.append({name: FileEntry(**entry).problem(path.parent / name) for name, entry in entries.items()})
            assert json.loads(text)["sha256"] == FileEntry.of(path.parent / INDEX).sha256
            assert not checkpoint_dir(tmp_path, 3).exists()
        return write_text(path, text, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", look)
    final = publish(tmp_path, 3)
    assert found == [{SHARD: "", RECIPE_FILE: "", STATE: ""}]
    assert checkpoint.problems_of(final) == []


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [(None, 2, [4, 5]), (None, 1, [5]), (1, 2, [1, 4, 5]), (3, 1, [3, 5]), (5, 2, [4, 5]), (None, 9, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(tmp_path, best, keep, left):
    for step in range(1, 6):
        publish(tmp_path, step)
    checkpoint._remove_old(tmp_path, keep, best)
    assert steps(tmp_path) == left
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in left
    ]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    for step in (1, 2):
        publish(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._remove_old(tmp_path, 1, None)
    assert steps(tmp_path) == [2]
    assert os.listdir(checkpoint_dir(tmp_path, 1))


def _interrupted(path: Path, *_, **__) -> None:
    """As far as a kill lets it come: some file is gone, others are not."""
    next(file for file in sorted(path.iterdir()) if file.name != MARKER).unlink()
    raise KeyboardInterrupt


def test_an_index_that_names_files_elsewhere_is_a_problem(tmp_path):
    final = publish(tmp_path, 3)
    index = json.loads((final / INDEX).read_text())
    index["files"]["../../recipe.yaml"] = index["files"][RECIPE_FILE]
    (final / INDEX).write_text(json.dumps(index))
    (final / MARKER).write_text(json.dumps(vars(FileEntry.of(final / INDEX))))
    assert checkpoint.problems_of(final) == [
        f"{final / INDEX}: names '../../recipe.yaml', which is no file of the checkpoint"
    ]

"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest

from ssgen_ds.checkpoint.choose import check_resumable, choose_checkpoint, find_checkpoints
from ssgen_ds.checkpoint.save import TrainState
from ssgen_ds.checkpoint.shard_file import FileEntry
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.run.folder import open_run
from ssgen_ds.run.layout import INDEX, MARKER, STATE, checkpoint_dir

WORLD = mock.Mock(
    rank=0, size=1, is_main=True, broadcast=lambda item: item, gather=lambda item: [item], together=lambda work: work()
)


@pytest.fixture(autouse=True)
def first_start(monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def save(run_dir: Path, *steps: int) -> list[Path]:
    """Complete checkpoints with nothing but a state in them."""
    for step in steps:
        path = checkpoint_dir(run_dir, step)
        path.mkdir(parents=True)
        (path / STATE).write_text("{}")
        (path / INDEX).write_text(json.dumps({"files": {STATE: asdict(FileEntry.of(path / STATE))}}))
        (path / MARKER).write_text(json.dumps({"step": step, **asdict(FileEntry.of(path / INDEX))}))
    return [checkpoint_dir(run_dir, step) for step in steps]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_resume_means(tmp_path):
    one, two = save(tmp_path / "run", 2, 4)
    assert find_checkpoints(tmp_path / "run", "auto") == [two, one]
    assert find_checkpoints(tmp_path / "run", "never") == []
    assert find_checkpoints(tmp_path / "new", str(tmp_path / "run")) == [two, one]
    assert find_checkpoints(tmp_path / "new", str(one)) == [one]
    with pytest.raises(UserError, match="neither a checkpoint nor a run with one"):
        find_checkpoints(tmp_path / "new", str(tmp_path))


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("resume", ["never", "PATH"])
def test_a_requeued_job_goes_on_from_its_own_whatever_resume_says(tmp_path, monkeypatch, variable, resume):
    (origin,) = save(tmp_path / "origin", 2)
    resume = str(origin) if resume == "PATH" else resume
    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_steps": 9}}
    recipe = parse_recipe({**raw, "output_dir": str(tmp_path / "run"), "resume": resume})
    before = find_checkpoints(tmp_path / "run", resume)
    monkeypatch.setenv(variable, "1")
    assert find_checkpoints(tmp_path / "run", resume) == before, "it had not come so far as to save"
    (own,) = save(tmp_path / "run", 4)
    (tmp_path / "run" / "recipe.yaml").touch()
    assert find_checkpoints(tmp_path / "run", resume) == [own]
    with mock.patch("ssgen_ds.run.folder.refuse_changes"):
        open_run(recipe)
        monkeypatch.setenv(variable, "0")
        if resume == "never":
            with pytest.raises(UserError, match="resume is never"):
                open_run(recipe)


def test_going_back_in_a_run_sets_aside_what_comes_after(tmp_path):
    """Else the next checkpoint, of step 3, would be removed as the oldest."""
    one, *_ = save(tmp_path / "run", 2, 4, 6)
    assert choose_checkpoint([one], tmp_path / "run", WORLD) == one
    assert names(tmp_path / "run") == ["left-step-00000004", "left-step-00000006", "step-00000002"]


def test_a_branch_leaves_the_run_that_it_comes_from_alone(tmp_path):
    one, *_ = save(tmp_path / "run", 2, 4)
    assert choose_checkpoint([one], tmp_path / "branch", WORLD) == one
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]


SAVED = TrainState(4, 2, "data-of-then", "tokenizer-of-then", 2, 3, {"torch": "2.1"}, skipped=1, skipped_in_row=1)


@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_other_data_and_another_tokenizer_are_refused(what):
    """Both fingerprints are compared, each by itself."""
    now = replace(SAVED, step=0, **{f"{what}_fingerprint": "another"})
    with pytest.raises(UserError, match=f"trained with another {what} "):
        check_resumable(Path("step-4"), SAVED, now, pytest.fail)


def test_what_else_differs_is_said_and_the_place_is_the_checkpoints():
    said: list[str] = []
    now = replace(SAVED, step=0, round=0, world_size=1, zero_stage=2, packages={"torch": "2.2"}, skipped=0)
    state = check_resumable(Path("step-4"), SAVED, now, said.append)
    parts = ["ranks 2, now 1:", "ZeRO stage 3, now 2:", "torch 2.1, now 2.2:"]
    assert all(part in line for part, line in zip(parts, said, strict=True))
    assert state == replace(SAVED, world_size=1, zero_stage=2, packages={"torch": "2.2"})
    assert check_resumable(Path("step-4"), SAVED, replace(SAVED, step=0), pytest.fail) == SAVED

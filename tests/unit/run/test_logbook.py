from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import LogConfig
from ssgen_ds.run.logbook import Logbook, drop_rows_after, missing_packages, read_rows
from tests.support.damage import room_for

FILES_ONLY = LogConfig(tensorboard=False)


def write_steps(run_dir: Path, steps: range, resume_step: int, log_config: LogConfig = FILES_ONLY) -> None:
    with Logbook(run_dir, log_config, resume_step, "test") as logbook:
        for step in steps:
            logbook.log({"step": step, "loss": float(step), "eval_loss": 2.0 * step})


def steps_in(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    with Logbook(tmp_path, FILES_ONLY, 0, "test") as logbook:
        logbook.log({"step": 1, "loss": 2.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n'


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with Logbook(tmp_path, FILES_ONLY, 0, "test") as logbook:
        logbook.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "mix_rate": None})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "loss": None, "grad_norm": None, "lr": None, "mix_rate": None}


def test_resume_drops_later_rows_and_every_step_appears_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), 0)
    write_steps(tmp_path, range(5, 11), resume_step=4)
    assert steps_in(tmp_path) == list(range(1, 11))


def test_a_fresh_run_forgets_the_old_rows(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), 0)
    write_steps(tmp_path, range(1, 3), 0)
    assert steps_in(tmp_path) == [1, 2]


def test_resume_without_earlier_rows_starts_at_the_next_step(tmp_path: Path) -> None:
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert steps_in(tmp_path) == [5, 6]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "text": "\xc3', b"{", b"3"])
def test_torn_last_line_is_dropped_on_resume(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert steps_in(tmp_path) == [1, 2]
    write_steps(tmp_path, range(4, 5), resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 4]


def test_last_row_without_its_newline_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, range(3, 4), resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        Logbook(tmp_path, FILES_ONLY, 3, "test")


def test_a_kill_while_rewriting_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_rows_after(path, 1)
    assert steps_in(tmp_path) == [1, 2]


def test_a_step_logged_twice_is_a_bug(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), 0)
    with (
        Logbook(tmp_path, FILES_ONLY, 2, "test") as logbook,
        pytest.raises(AssertionError, match="step 2 after step 2"),
    ):
        logbook.log({"step": 2})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both = LogConfig(tensorboard=True)
    write_steps(tmp_path, range(1, 8), 0, both)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host"))  # an earlier second, as in a real resume
    write_steps(tmp_path, range(5, 7), 4, both)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(s, float(s)) for s in range(1, 7)]


def test_a_full_disk_ends_the_charts_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, at once; what was written before can be read, and metrics.jsonl has every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Logbook(tmp_path, LogConfig(tensorboard=True), 0, "test") as logbook:
        for step in range(1, 4):
            logbook.log({"step": step, "loss": float(step)})
        (file,) = (tmp_path / "tensorboard").iterdir()
        size = file.stat().st_size
        with room_for(size + 20):
            for step in range(4, 7):
                logbook.log({"step": step, "loss": float(step)})
    assert file.stat().st_size == size, "half an event is none"
    assert [record.getMessage() for record in caplog.records] == [
        f"tensorboard: from step 4 on there are no charts: [Errno 27] File too large: '{file}' "
        "(metrics.jsonl has every step)"
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_at_the_start_leaves_no_empty_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with room_for(20):
        logbook = Logbook(tmp_path, LogConfig(tensorboard=True), 0, "test")
    logbook.log({"step": 1, "loss": 1.0})
    logbook.close()
    assert list((tmp_path / "tensorboard").iterdir()) == [] and len(caplog.records) == 1
    assert "tensorboard: from step 1 on there are no charts" in caplog.text


def test_a_row_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with Logbook(tmp_path, FILES_ONLY, 0, "test") as logbook:
        with room_for(10), pytest.raises(OSError, match="File too large"):
            logbook.log({"step": 1, "loss": 1.0})
        assert list(tmp_path.iterdir()) == []
        logbook.log({"step": 1, "loss": 1.0})
        with room_for(40), pytest.raises(OSError, match="File too large"):
            logbook.log({"step": 2, "loss": 2.0})
        logbook.log({"step": 2, "loss": 2.0})
    assert steps_in(tmp_path) == [1, 2]


def test_no_tensorboard_folder_unless_asked_for(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_missing_wandb_is_a_user_error(tmp_path: Path, without_wandb: None) -> None:
    config = LogConfig(tensorboard=False, wandb=True)
    with pytest.raises(UserError, match="pip install wandb"):
        Logbook(tmp_path / "run", config, 0, "test")
    assert not (tmp_path / "run").exists()
    assert missing_packages(FILES_ONLY) == []


def test_a_folder_called_wandb_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_wandb: None
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert importlib.util.find_spec("wandb") is not None
    assert len(missing_packages(LogConfig(wandb=True))) == 1


@pytest.fixture
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import path on which wandb is not installed, whether it is on this machine or not."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    kept = [entry for entry in sys.path if not (Path(entry or ".") / "wandb").is_dir()]
    monkeypatch.setattr(sys, "path", kept)
    importlib.invalidate_caches()


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = LogConfig(tensorboard=False, wandb=True)
    write_steps(tmp_path, range(1, 4), 0, config)
    run_id = (tmp_path / "wandb-run-id").read_text().strip()
    write_steps(tmp_path, range(3, 5), 2, config)
    assert (tmp_path / "wandb-run-id").read_text().strip() == run_id
    # Two processes of one run; two that start within a second share a folder.
    assert {path.suffix for path in (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")} == {".wandb"}
    write_steps(tmp_path, range(1, 2), 0, config)  # started again before its first checkpoint
    assert (tmp_path / "wandb-run-id").read_text().strip() == run_id
    assert steps_in(tmp_path) == [1]


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 0.1 + 0.2, "note": "naïve\nline"}
    with Logbook(tmp_path, FILES_ONLY, 0, "test") as logbook:
        logbook.log(row)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row

"""One recipe through every launcher, and through everything that can end a run early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssgen_ds.selfgen.round_file import read_round
from tests.e2e.conftest import WriteRecipe, weights_hash
from tests.support.launch import Finished, deepspeed, finish, run, start, torchrun

SSGEN = str(Path(sys.executable).parent / "ssgen")
LIMIT = 150  # seconds a launch may take on a busy machine
ALONE = {"train__max_steps": 24}
SHARDED = {"train__max_steps": 6, "deepspeed": "ds_configs/zero3.json"}
OUR_LINES = ("round ", "step ", "model: ", "report: ", "self-generation: ", "selfgen.reuse: ")


@pytest.fixture(scope="module")
def alone(inputs: Path, write_recipe: WriteRecipe) -> dict[str, Finished]:
    """The same run in one process, by both entries, side by side."""
    processes = {
        "ssgen": start([SSGEN, "train", str(write_recipe("ssgen", **ALONE))]),
        "module": start([sys.executable, "-m", "ssgen_ds.train", str(write_recipe("module", **ALONE))]),
    }
    return {name: finish(process, LIMIT) for name, process in processes.items()}


@pytest.fixture(scope="module")
def two_ranks(inputs: Path, write_recipe: WriteRecipe) -> dict[str, Finished]:
    return {
        "deepspeed": run(deepspeed("ssgen_ds.train", str(write_recipe("deepspeed", **SHARDED))), LIMIT),
        "torchrun": run(torchrun("ssgen_ds.train", str(write_recipe("torchrun", **SHARDED))), LIMIT),
    }


def rows(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.endswith("}")]


def same_training(one: Path, other: Path) -> bool:
    """Equal weights and equal self-generated tokens, to the bit; every step once in both."""
    tokens = [[read_round(file) for file in sorted((run / "selfgen").glob("*.parquet"))] for run in (one, other)]
    steps = [[row["step"] for row in rows(run)] for run in (one, other)]
    assert tokens[0] and steps[0] == list(range(1, len(steps[0]) + 1))
    return weights_hash(one) == weights_hash(other) and tokens[0] == tokens[1] and steps[0] == steps[1]


def test_one_process_by_either_entry(alone: dict[str, Finished], inputs: Path) -> None:
    assert [result.returncode for result in alone.values()] == [0, 0], alone
    assert same_training(inputs / "runs" / "ssgen", inputs / "runs" / "module")


def test_two_ranks_by_either_launcher(two_ranks: dict[str, Finished], inputs: Path) -> None:
    assert [result.returncode for result in two_ranks.values()] == [0, 0], two_ranks
    assert same_training(inputs / "runs" / "deepspeed", inputs / "runs" / "torchrun")


def test_a_normal_run_says_nothing_but_its_own_lines(
    alone: dict[str, Finished], two_ranks: dict[str, Finished]
) -> None:
    for result in (*alone.values(), two_ranks["torchrun"]):
        assert [line for line in result.stdout.splitlines() if not line.startswith(OUR_LINES)] == []
    assert [result.stderr for result in alone.values()] == ["", ""]
    assert two_ranks["torchrun"].stdout.count("report: ") == 1, "only rank 0 speaks"


def test_a_finished_run_says_so(alone: dict[str, Finished], inputs: Path) -> None:
    before = weights_hash(inputs / "runs" / "ssgen")
    result = run([SSGEN, "train", str(inputs / "ssgen.yaml")], LIMIT)
    assert result.returncode == 0
    assert "this run is finished" in result.stdout
    assert len(rows(inputs / "runs" / "ssgen")) == 24
    assert weights_hash(inputs / "runs" / "ssgen") == before


def test_a_run_on_a_file_system_that_is_read_only(alone: dict[str, Finished], inputs: Path, tmp_path: Path) -> None:
    """Results that are shared: a finished run says so, one that is not is refused."""
    run_dir = inputs / "runs" / "ssgen"
    command = [SSGEN, "train", str(inputs / "ssgen.yaml"), f"output_dir={tmp_path}"]
    mounted = subprocess.run(["mount", "--bind", str(run_dir), str(tmp_path)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user cannot mount: {mounted.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
        finished = run(command, LIMIT)
        changed = run([*command, "train.lr=0.5"], LIMIT)
        (run_dir / "finished.json").rename(inputs / "finished.json")
        unfinished = run(command, LIMIT)
        (inputs / "finished.json").rename(run_dir / "finished.json")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (finished.returncode, finished.stderr) == (0, "") and "this run is finished" in finished.stdout
    assert changed.returncode == 2 and "train.lr: 0.01 -> 0.5" in changed.stderr
    assert unfinished.returncode == 2, unfinished
    assert f"output_dir: {tmp_path} cannot be written to: Read-only file system; name another" in unfinished.stderr
    assert unfinished.stderr.count("\n") == 1


def test_user_errors_exit_2_with_one_message(inputs: Path, write_recipe: WriteRecipe) -> None:
    recipe = str(write_recipe("wrong", data__train=str(inputs / "nosuch.jsonl")))
    commands = {
        "recipe": [SSGEN, "train", recipe, "train.learning_rate=1", "train.lr=0"],
        "data": [SSGEN, "train", recipe],
        "deepspeed": deepspeed("ssgen_ds.train", recipe, "model.path=./nowhere", "deepspeed=nowhere.json"),
    }
    processes = {name: start(command) for name, command in commands.items()}
    results = {name: finish(process, LIMIT) for name, process in processes.items()}
    for result in results.values():
        assert result.returncode == 2, result
        assert "Traceback" not in result.stderr + result.stdout
        assert (result.stderr + result.stdout).count("error: ") == 1, result
    assert "2 problems" in results["recipe"].stderr
    assert "did you mean train.lr?" in results["recipe"].stderr
    told = results["deepspeed"].stderr
    assert "3 problems" in told, "one start tells everything, on two ranks as on one"
    for message in ("data.train: no such file", "model.path: ./nowhere: no such file", "deepspeed: no such file"):
        assert told.count(message) == 1, told
    assert not (inputs / "runs" / "wrong").exists(), "a refused run leaves nothing behind"


def test_stop_signals_exit_75_and_the_run_goes_on_to_the_same_weights(
    alone: dict[str, Finished], inputs: Path, write_recipe: WriteRecipe
) -> None:
    run_dir = inputs / "runs" / "stopped"
    command = [SSGEN, "train", str(write_recipe("stopped", **ALONE))]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process, done = start(command), len(rows(run_dir))
        wait_until(process, lambda done=done: len(rows(run_dir)) >= done + 2)
        process.send_signal(number)
        result = finish(process, LIMIT)
        assert result.returncode == 75, result
        assert result.stderr.count("stopped on request at step") == 1 and "Traceback" not in result.stderr
        assert (run_dir / "checkpoints" / f"step-{len(rows(run_dir)):08d}" / "COMPLETE").is_file()
    assert run(command, LIMIT).returncode == 0
    assert same_training(run_dir, inputs / "runs" / "ssgen")


def test_a_killed_run_goes_on_to_the_same_weights_and_tokens(
    two_ranks: dict[str, Finished], inputs: Path, write_recipe: WriteRecipe
) -> None:
    run_dir = inputs / "runs" / "killed"
    command = deepspeed("ssgen_ds.train", str(write_recipe("killed", checkpoint__every=1, **SHARDED)))
    process = start(command)
    wait_until(process, lambda: (run_dir / "checkpoints" / "step-00000002" / "COMPLETE").is_file())
    kill_tree(process.pid)
    assert finish(process, LIMIT).returncode == -signal.SIGKILL
    assert 2 <= len(rows(run_dir)) < 6 and not (run_dir / "model").exists()
    result = run(command, LIMIT)
    assert result.returncode == 0, result
    assert same_training(run_dir, inputs / "runs" / "deepspeed")


def test_a_full_disk_is_one_message_and_no_checkpoint(inputs: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        recipe = write_recipe("full", output=tmp_path / "run", train__max_steps=2)
        result = run([SSGEN, "train", str(recipe)], LIMIT)
        assert result.returncode == 2, result
        assert result.stderr.startswith("error: the checkpoint of step ")
        assert f"no disk space for a checkpoint: {tmp_path / 'run'}" in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.rglob("COMPLETE")) == [] and list(tmp_path.rglob("step-*")) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_tree(process.pid)
            raise AssertionError(f"it ended too early or never came so far: {finish(process, 10)}")
        time.sleep(0.02)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, as a node that goes down does; launchers start new sessions."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    tree = [pid]
    for parent in tree:
        tree += children.get(parent, [])
    for one in tree:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue

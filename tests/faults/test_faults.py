"""The faults of docs/clusters.md through the real launchers: each is injected into real ranks, and the resumed run is
compared with an undisturbed one.

The short ones run with `make test`; those marked `faults`, minutes each, with `make test-faults`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssgen_ds.recipe.load import dump_recipe
from tests.e2e.test_launchers import rows, same_training, wait_until
from tests.support.damage import DAMAGE
from tests.support.launch import Finished, deepspeed, finish, free_port, run, start, torchrun
from tests.support.tiny_runs import make_inputs, tiny_recipe

LIMIT = 150
STEPS = 6
LOST = 30  # seconds in which the others must end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_inputs(folder)
    (folder / "shared-memory").write_text(json.dumps(shared_memory()))
    return folder


def shared_memory() -> list[str]:
    """DeepSpeed's buffers that have a name."""
    return sorted(file.name for file in Path("/dev/shm").glob("deepspeed_*"))


def recipe_file(folder: Path, name: str, **overrides: object) -> Path:
    settings = {
        "method__name": "bss+rac",
        "adapter__rank": 4,
        "train__max_steps": STEPS,
        "deepspeed": "ds_configs/zero3.json",
        "checkpoint__every": 2,
        **overrides,
    }
    file = folder / f"{name}.yaml"
    file.write_text(dump_recipe(tiny_recipe(folder, folder / "runs" / name, **settings)), encoding="utf-8")
    return file


def train(folder: Path, name: str, fault: str = "", launcher=torchrun, **overrides: object) -> Finished:
    extra = {"SSGEN_FAULT": fault} if fault else {}
    return run(launcher("ssgen_ds.train", str(recipe_file(folder, name, **overrides))), LIMIT, **extra)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    result = train(folder, "reference")
    assert result.returncode == 0, result
    return folder / "runs" / "reference"


def complete(run_dir: Path) -> list[str]:
    return sorted(marker.parent.name for marker in (run_dir / "checkpoints").glob("step-*/COMPLETE"))


def assert_goes_on(folder: Path, name: str, reference: Path) -> Finished:
    result = train(folder, name)
    assert result.returncode == 0, result
    assert same_training(folder / "runs" / name, reference)
    return result


# F1 -------------------------------------------------------------------------------------------------------------------

QUICK, LONG = ["backward", "shard"], ["generate", "mixing", "drafting", "pass", "optimizer", "written"]


@pytest.mark.parametrize("phase", QUICK + [pytest.param(phase, marks=pytest.mark.faults) for phase in LONG])
def test_a_killed_rank_ends_the_other_and_the_run_goes_on(folder: Path, reference: Path, phase: str) -> None:
    """F1, F5: the second save is the one that is hit."""
    step = 5 if phase in ("generate", "mixing", "drafting", "pass") else 4
    began = time.monotonic()
    # F5: in the middle of its shard, while the other has long written its own.
    delay = f"delay=3@{phase}:1:{step}," if phase == "shard" else ""
    result = train(folder, f"kill-{phase}", f"{delay}kill@{phase}:1:{step}")
    assert result.returncode != 0
    assert time.monotonic() - began < LOST + 30  # the start takes up to 30 s on a busy machine
    assert complete(folder / "runs" / f"kill-{phase}") == ["step-00000002"] + ["step-00000004"] * (step == 5)
    assert_goes_on(folder, f"kill-{phase}", reference)


@pytest.mark.faults
def test_two_signals_and_a_kill_during_the_save(folder: Path, reference: Path) -> None:
    """F4: a stop is under way, another signal comes while saving, then the kill; the stale folder is written over."""
    result = train(folder, "impatient", "term@backward:0:4,term@shard:0:4,term@written:0:4,kill@publish:0:4")
    assert result.returncode != 0
    assert complete(folder / "runs" / "impatient") == ["step-00000002"]
    assert list((folder / "runs" / "impatient" / "checkpoints").glob(".partial-step-00000004/shard-*"))
    assert "resumed at step 2" in assert_goes_on(folder, "impatient", reference).stdout
    assert not list((folder / "runs" / "impatient" / "checkpoints").glob(".partial-*"))


# F18 ------------------------------------------------------------------------------------------------------------------


def test_a_rank_killed_while_the_ranks_meet_ends_the_other(folder: Path) -> None:
    """With the deepspeed launcher's LOCAL_SIZE, but without the launcher, which would kill the other itself."""
    recipe = str(recipe_file(folder, "kill-meet"))
    place = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "ssgen_ds.train", recipe]
    ranks = [
        start(command, RANK=str(rank), LOCAL_RANK=str(rank), SSGEN_FAULT="kill@meet:0:0", **place) for rank in (0, 1)
    ]
    assert finish(ranks[0], LIMIT).returncode == -signal.SIGKILL
    other = finish(ranks[1], LOST)
    assert other.returncode == 1 and "rank 0" in other.stderr, other


# F2 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "phase"), [(1, "backward"), pytest.param(0, "mixing", marks=pytest.mark.faults)])
def test_a_rank_that_stands_still_is_named(folder: Path, reference: Path, rank: int, phase: str) -> None:
    name = f"stop-{phase}"
    result = train(folder, name, f"delay=2@{phase}:{rank}:3,stop@{phase}:{rank}:3", recovery__rank_silence=5)
    assert result.returncode != 0
    assert f"error: rank {rank} on " in result.stderr and f"last in {phase} of step 3" in result.stderr, result
    assert "Traceback" not in result.stderr.split("elastic")[0]
    assert_goes_on(folder, name, reference)


# F3 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "strategy"), [("usr1", "sharded"), pytest.param("term", "gathered", marks=pytest.mark.faults)]
)
def test_a_signal_to_one_rank_in_a_generation_stops_all(
    folder: Path, reference: Path, kind: str, strategy: str
) -> None:
    """The round of step 3 is left in its first pass, the checkpoint is that of step 2."""
    name = f"{kind}-{strategy}"
    result = train(folder, name, f"{kind}@pass:1:3", deepspeed, checkpoint__every=None, selfgen__strategy=strategy)
    assert result.returncode == 75, result
    assert "stopped on request at step 2" in result.stderr
    assert complete(folder / "runs" / name) == ["step-00000002"]
    assert [row["step"] for row in rows(folder / "runs" / name)] == [1, 2]
    assert "resumed at step 2" in assert_goes_on(folder, name, reference).stdout


def test_a_signal_while_the_libraries_are_imported(folder: Path) -> None:
    """The handlers stand before the imports, which take longer than all else of a start; nothing was trained."""
    name = "early"
    process = start([sys.executable, "-m", "ssgen_ds.train", str(recipe_file(folder, name))])
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(process, lambda: "libtorch" in maps.read_text())
    process.send_signal(signal.SIGUSR1)
    result = finish(process, LIMIT)
    assert result.returncode == 75, result
    assert "stopped on request before anything was trained" in result.stderr
    assert rows(folder / "runs" / name) == []


def test_ranks_that_wait_for_each_other_are_named(folder: Path) -> None:
    """No rank is silent, none makes progress: the limit on collectives, with the phase of each."""
    settings = {"recovery__collective_timeout": 15, "recovery__rank_silence": 60}
    result = train(folder, "waiting", "delay=100@backward:1:3", **settings)
    assert result.returncode != 0
    assert "error: no rank has made progress for " in result.stderr, result
    assert "ranks 0, 1 in backward of step 3" in result.stderr, "of both, not of one"


# F15, one error on one rank -------------------------------------------------------------------------------------------


def test_a_crash_loop_is_stopped_with_its_reason(folder: Path) -> None:
    """One start and one restart are allowed here; the third is refused, in the words of the rank that failed."""
    name, fault = "loop", "raise@optimizer:1:3"
    results = [train(folder, name, fault, recovery__max_restarts=1, checkpoint__every=1) for _ in range(3)]
    assert [result.returncode for result in results] == [1, 1, 1]  # torchrun turns 2 into 1
    assert "RuntimeError: injected in optimizer at step 3" in results[0].stderr
    attempts = [json.loads(line) for line in (folder / "runs" / name / "attempts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in attempts if "step" in row] == [0, 2, 2]
    again = train(folder, name, fault, recovery__max_restarts=1, checkpoint__every=1)
    assert again.returncode == 1
    assert "started 2 times from step 2 and never got further" in again.stderr, again
    assert "rank 1 on " in again.stderr and "optimizer of step 3: RuntimeError" in again.stderr
    assert "Traceback" not in again.stderr.split("elastic")[0]


# soak -----------------------------------------------------------------------------------------------------------------

ONCE_A_STEP = ("forward", "backward", "optimizer", "shard", "written", "publish")
ONCE_A_ROUND = ("generate", "pass", "mixing", "drafting")
HARM = ("kill", "term", "usr1", "enospc", "eacces", "raise", "delay=2,stop")
ROUND = 2  # steps


def steps_in(names: list[str]) -> int:
    """Steps of the newest of these checkpoints."""
    return int(names[-1].removeprefix("step-")) if names else 0


def draw_fault(rng: random.Random, done: int) -> tuple[str, str]:
    """Kind and whole text of a fault that strikes for sure in a start that goes on from step `done`."""
    harm, phase = rng.choice(HARM), rng.choice(ONCE_A_STEP + ONCE_A_ROUND)
    step = done + rng.randint(1, 2)
    if phase in ONCE_A_ROUND:
        step = done + 1 + done % ROUND  # the next round's first
        if step > STEPS:
            phase = "backward"
    rank = 0 if phase == "publish" else rng.randrange(2)
    return harm, ",".join(f"{kind}@{phase}:{rank}:{min(step, STEPS)}" for kind in harm.split(","))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_soak(folder: Path, reference: Path, seed: int) -> None:
    """A random fault on a random rank in a random phase at each start, until the run is done: bit-equal at the end.

    Before a start the newest checkpoint may be damaged, when there is one before it: it is named, and that one is used.
    """
    rng = random.Random(seed)
    name = f"soak-{seed}"
    run_dir = folder / "runs" / name
    settings = {"checkpoint__every": 1, "recovery__rank_silence": 5, "recovery__max_restarts": 0}
    starts, damaged = 0, 0
    while starts < 12 and not (run_dir / "finished.json").exists():
        there, newest = complete(run_dir), None
        if len(there) > 1 and rng.random() < 0.5:
            newest = run_dir / "checkpoints" / there.pop()
            DAMAGE[rng.choice(sorted(DAMAGE))](newest)
            damaged += 1
        harm, fault = draw_fault(rng, steps_in(there))
        result = train(folder, name, fault, rng.choice([torchrun, deepspeed]), **settings)
        starts += 1
        assert result.returncode in (0, 1, 2, 75, -9, 137, 247), (fault, result)
        assert newest is None or f"{newest} is broken" in result.stderr, (fault, result)
        traceback = "Traceback" in result.stderr.split("elastic")[0]
        assert not traceback or harm in ("raise", "enospc", "eacces"), (fault, result)
    assert starts >= 5 and damaged, "this seed does too little harm: choose another"
    result = train(folder, name, **settings)
    assert result.returncode == 0, result
    assert same_training(run_dir, reference)


# the launcher, the lock -----------------------------------------------------------------------------------------------


def test_ranks_whose_launcher_is_gone_save_and_end(folder: Path, reference: Path) -> None:
    """A launcher that dies leaves its ranks behind; a second job is refused as long as they live, and they save."""
    name = "orphans"
    command = deepspeed("ssgen_ds.train", str(recipe_file(folder, name)))
    process = start(command, SSGEN_FAULT="delay=30@backward:0:3,delay=30@backward:1:3")
    wait_until(process, lambda: len(rows(folder / "runs" / name)) == 2)
    refused = run([str(Path(sys.executable).parent / "ssgen"), "train", str(folder / f"{name}.yaml")], LIMIT)
    assert refused.returncode == 2 and "is being written by process" in refused.stderr, refused
    for launcher in (process.pid, *(child.pid for child in psutil.Process(process.pid).children())):
        os.kill(launcher, signal.SIGKILL)  # the command and the process of this node; the ranks are below it
    finish(process, LIMIT)
    deadline = time.monotonic() + 60
    while complete(folder / "runs" / name)[-1] != "step-00000003" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert complete(folder / "runs" / name)[-1] == "step-00000003"
    assert_goes_on(folder, name, reference)


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}


@pytest.mark.faults
def test_a_job_that_stood_still_leaves_the_folder_to_its_successor(folder: Path, reference: Path) -> None:
    """Both ranks are stopped for so long that another start takes the folder over; when they go on, they end."""
    name = "suspended"
    delays = ",".join(f"delay=20@backward:{rank}:3" for rank in (0, 1))
    # The other start takes long on a busy machine, and ranks that go on must not be ended by their clocks.
    command = torchrun("ssgen_ds.train", str(recipe_file(folder, name, recovery__rank_silence=600)))
    process = start(command, SSGEN_FAULT=delays)
    wait_until(process, lambda: len(rows(folder / "runs" / name)) == 2)
    suspended = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in suspended:
        one.suspend()
    assert_goes_on(folder, name, reference)
    before = contents(folder / "runs" / name)
    for one in suspended:
        one.resume()
    result = finish(process, LIMIT)
    assert result.returncode == 1, result
    after = contents(folder / "runs" / name)
    # A rank that finds rank 0 gone may say so after the end that the other start has noted; that one counts.
    assert after.pop("attempts.jsonl")[: len(before["attempts.jsonl"])] == before.pop("attempts.jsonl")
    assert after == before
    assert "was taken over by another job" in result.stderr and "it has ended since" in result.stderr, result


def test_nothing_of_the_runs_is_left(folder: Path) -> None:
    """No orphans: of all that was started above, no process is alive and no shared memory is left."""
    alive = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = cmdline.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text:
            alive.append(text.replace("\0", " "))
    assert alive == []
    assert shared_memory() == json.loads((folder / "shared-memory").read_text())
    shutil.rmtree(folder / "runs")

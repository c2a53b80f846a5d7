"""The scripts of `slurm/` through sbatch on a real cluster: faults F13 and F14 of docs/clusters.md. Runs are
compared bitwise.

The long ones are marked `faults`: `make test-faults`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.runs import STEPS, recipe_file, reference
from tests.e2e.test_launchers import rows, same_training
from tests.support.launch import run


def complete(run_dir: Path) -> list[str]:
    return sorted(marker.parent.name for marker in (run_dir / "checkpoints").glob("step-*/COMPLETE"))


def outcomes(run_dir: Path) -> list[tuple[int, str]]:
    """Of each start: the step that it began from, and how it ended."""
    lines = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    starts = [line["step"] for line in lines if "step" in line]
    return list(zip(starts, [line["outcome"] for line in lines if "outcome" in line], strict=False))


def test_two_nodes_train_as_two_local_ranks_do(cluster: Cluster, inputs: Path) -> None:
    job = cluster.submit("train.sbatch", str(recipe_file(inputs, "nodes-bss", "bss")))
    facts = cluster.finish(job)
    assert facts["ExitCode"] == "0:0", cluster.log(job)
    assert same_training(inputs / "runs" / "nodes-bss", reference(inputs, "bss"))


def test_a_job_written_and_submitted_for_its_recipe(cluster: Cluster, inputs: Path) -> None:
    """`ssgen slurm --submit`: to the same end as two local ranks; refused by sbatch, in its words."""
    ssgen = str(Path(sys.executable).parent / "ssgen")
    command = (ssgen, "slurm", str(recipe_file(inputs, "nodes-rac", "rac")), "--nodes", "2", "--submit")
    said = cluster.run(*command, "--time", "5", SBATCH_OUTPUT=str(cluster.folder / "job-%j.log"))
    job = said.removeprefix("Submitted batch job ")
    assert cluster.finish(job)["ExitCode"] == "0:0", cluster.log(job)
    assert cluster.show(job)["TimeLimit"] == "00:05:00"
    assert same_training(inputs / "runs" / "nodes-rac", reference(inputs, "rac"))
    refused = run([*command, "--partition", "nowhere"], 60, **cluster.environment())
    assert refused.returncode == 2, refused
    assert "error: sbatch refused the job: " in refused.stderr and "invalid partition" in refused.stderr


def test_a_node_with_two_gpus_gets_two_ranks(cluster: Cluster, inputs: Path) -> None:
    """And fewer CPUs than ranks: they share."""
    recipe, options = str(recipe_file(inputs, "two-gpus")), ("--nodes=1", "--gpus-per-node=2")
    job = cluster.submit("train.sbatch", recipe, options=options)
    assert cluster.finish(job)["ExitCode"] == "0:0", cluster.log(job)
    environment = json.loads((inputs / "runs" / "two-gpus" / "environment.json").read_text())
    assert environment["world_size"] == 2 and cluster.show(job)["NumNodes"] == "1"
    assert same_training(inputs / "runs" / "two-gpus", reference(inputs))


def test_the_deepspeed_launcher_stops_and_goes_on(cluster: Cluster, inputs: Path) -> None:
    """The signal reaches the ranks, not the launcher, which would leave them behind; 75 comes back."""
    run_dir = inputs / "runs" / "launcher"
    recipe = str(recipe_file(inputs, "launcher"))
    job = cluster.submit("deepspeed.sbatch", recipe, SSGEN_FAULT="delay=8@backward:0:3,delay=8@backward:1:3")
    cluster.wait_until(job, lambda: len(rows(run_dir)) == 2)
    time.sleep(3)  # now both are in the backward pass of step 3
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.finish(job)["ExitCode"] == "75:0", cluster.log(job)
    assert complete(run_dir) == ["step-00000002", "step-00000003"]
    job = cluster.submit("deepspeed.sbatch", recipe)
    assert cluster.finish(job)["ExitCode"] == "0:0", cluster.log(job)
    assert same_training(run_dir, reference(inputs))


def test_a_signal_saves_and_requeues_once(cluster: Cluster, inputs: Path) -> None:
    """F13: the same job, the same log, the exact number of steps."""
    run_dir = inputs / "runs" / "requeued"
    job = cluster.submit(
        "requeue.sbatch", str(recipe_file(inputs, "requeued")), SSGEN_FAULT="delay=8@pass:0:3,delay=8@pass:1:3"
    )
    cluster.wait_until(job, lambda: len(rows(run_dir)) == 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    facts = cluster.finish(job, timeout=240)
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "1"), cluster.log(job)
    log = cluster.log(job)
    assert log.index("stopped on request at step 2") < log.index("resumed at step 2"), "appended, not overwritten"
    assert outcomes(run_dir) == [(0, "stopped"), (2, "finished")]
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert same_training(run_dir, reference(inputs))


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, inputs: Path) -> None:
    run_dir = inputs / "runs" / "cancelled"
    fault = "delay=5@backward:0:2,delay=5@backward:1:2"
    job = cluster.submit("requeue.sbatch", str(recipe_file(inputs, "cancelled")), SSGEN_FAULT=fault)
    cluster.wait_until(job, lambda: len(rows(run_dir)) == 1)
    cluster.run("scancel", job)
    while cluster.run("squeue", "-h", "-o", "%T"):
        time.sleep(0.3)
    time.sleep(8)  # longer than a requeued job waits
    facts = cluster.show(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    assert outcomes(run_dir) == [(0, "stopped")]
    assert complete(run_dir), cluster.log(job)


def test_a_wrong_recipe_is_not_requeued(cluster: Cluster, inputs: Path) -> None:
    job = cluster.submit("requeue.sbatch", str(recipe_file(inputs, "wrong")), "train.lr=fast")
    facts = cluster.finish(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    assert "train.lr" in cluster.log(job) and "Traceback" not in cluster.log(job)


@pytest.mark.faults
def test_two_steps_of_one_job_do_not_write_one_folder(cluster: Cluster, inputs: Path) -> None:
    """F20: the second has the first's host and job id. It is refused while the first stands in a backward pass."""
    run_dir, recipe = inputs / "runs" / "steps", recipe_file(inputs, "steps", deepspeed="ds_configs/zero0.json")
    step = f"srun --overlap --ntasks=1 {sys.executable} -m ssgen_ds.train {recipe}"
    script = (
        f"SSGEN_FAULT=delay=60@backward:0:2 {step} & "
        f"until [ -s {run_dir}/metrics.jsonl ]; do sleep 0.3; done; {step}; echo the second: $?; "
        "wait $!; echo the first: $?"
    )
    log = cluster.folder / "job-%j.log"
    job = cluster.run("sbatch", "--parsable", "--nodes=1", f"--output={log}", f"--wrap={script}")
    assert cluster.finish(job, timeout=300)["ExitCode"] == "0:0", cluster.log(job)
    log = cluster.log(job)
    assert log.index("the second: 2") < log.index("the first: 0"), log
    assert f"output_dir: {run_dir} is being written by process " in log and f", SLURM job {job}, at " in log
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert outcomes(run_dir) == [(0, "finished")]


@pytest.mark.faults
def test_the_time_limit_saves_and_requeues(cluster: Cluster, inputs: Path) -> None:
    """F13: a limit of two minutes, told 60 s before; each start gets some steps done."""
    run_dir = inputs / "runs" / "limited"
    delays = ",".join(f"delay=15@backward:{rank}:{step}" for rank in (0, 1) for step in range(1, STEPS + 1))
    options = ("--time=2", "--signal=B:USR1@60")
    job = cluster.submit("requeue.sbatch", str(recipe_file(inputs, "limited")), options=options, SSGEN_FAULT=delays)
    facts = cluster.finish(job, timeout=600)
    assert facts["ExitCode"] == "0:0" and int(facts["Restarts"]) >= 1, cluster.log(job)
    assert [how for _, how in outcomes(run_dir)] == ["stopped"] * int(facts["Restarts"]) + ["finished"]
    assert same_training(run_dir, reference(inputs))


@pytest.mark.faults
def test_preemption_saves_and_requeues(cluster: Cluster, inputs: Path) -> None:
    """A job of a higher partition takes the nodes: the ranks get SIGTERM and the grace time."""
    run_dir = inputs / "runs" / "preempted"
    fault = "delay=6@backward:0:3,delay=6@backward:1:3"
    job = cluster.submit("requeue.sbatch", str(recipe_file(inputs, "preempted")), SSGEN_FAULT=fault)
    cluster.wait_until(job, lambda: len(rows(run_dir)) == 2)
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    facts = cluster.finish(job, timeout=300)
    assert facts["ExitCode"] == "0:0" and facts["Restarts"] == "1", cluster.log(job)
    assert outcomes(run_dir)[0] == (0, "stopped")
    assert same_training(run_dir, reference(inputs))


@pytest.mark.faults
def test_requeued_in_the_middle_of_a_save(cluster: Cluster, inputs: Path) -> None:
    """F14: `scontrol requeue` while step 4 is being saved, for longer than SLURM waits before it kills."""
    run_dir = inputs / "runs" / "mid-save"
    recipe = str(recipe_file(inputs, "mid-save", train__max_steps=6))
    job = cluster.submit("requeue.sbatch", recipe, SSGEN_FAULT="delay=60@written:1:4")
    partial = run_dir / "checkpoints" / ".partial-step-00000004"
    cluster.wait_until(job, lambda: any(partial.glob("shard-*")))
    cluster.run("scontrol", "requeue", job)
    facts = cluster.finish(job, timeout=300)
    assert facts["ExitCode"] == "0:0" and int(facts["Restarts"]) >= 1, cluster.log(job)
    assert "resumed at step 2" in cluster.log(job)
    whole = inputs / "runs" / "mid-save-reference"
    other = cluster.submit("train.sbatch", str(recipe_file(inputs, "mid-save-reference", train__max_steps=6)))
    assert cluster.finish(other)["ExitCode"] == "0:0"
    assert same_training(run_dir, whole)


@pytest.mark.faults
def test_a_killed_node_ends_the_job_fast_and_it_goes_on(cluster: Cluster, inputs: Path) -> None:
    """F14: the rank of one node is killed; the other ends by itself, the job requeues, the result is the same."""
    run_dir = inputs / "runs" / "node-lost"
    recipe = recipe_file(inputs, "node-lost", recovery__rank_silence=10)
    job = cluster.submit("requeue.sbatch", str(recipe), SSGEN_FAULT="delay=8@backward:0:3,delay=8@backward:1:3")
    cluster.wait_until(job, lambda: len(rows(run_dir)) == 2)
    time.sleep(2)  # now both are in the backward pass of step 3
    (victim,) = [process for process in ranks_of(recipe) if process.environ()["SLURM_PROCID"] == "1"]
    victim.kill()
    began = time.monotonic()
    cluster.wait_until(job, lambda: "requeued" in cluster.log(job))
    assert time.monotonic() - began < 30
    assert "rank 1 on " in cluster.log(job)
    facts = cluster.finish(job, timeout=300)
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "1"), cluster.log(job)
    assert "resumed at step 2" in cluster.log(job)
    assert same_training(run_dir, reference(inputs))


def ranks_of(recipe: Path) -> list[psutil.Process]:
    """The running ranks of this recipe: Python, not the srun that started it."""
    wanted = ["-m", "ssgen_ds.train", str(recipe)]
    found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    return [process for process in found if process.info["cmdline"][1:4] == wanted]

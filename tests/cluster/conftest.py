"""A real SLURM cluster of two nodes on this machine: munged, slurmctld, and a slurmd for each node."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT, environment, free_port
from tests.support.tiny_runs import make_inputs

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
LEFT_OUT = "left out: the tests on a SLURM cluster need {} (Debian: apt-get install slurm-wlm munge)"
SYSTEM = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """
ClusterName=ssgen-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Credentials expire soon: a requeued job starts only when those of its last start have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:2
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


# For SLURM each node has two GPUs, so that it counts ranks by them: it asks for a device file of each, and no more. The
# ranks look for themselves and find none.
GRES = """
NodeName=n[1-2] Name=gpu File=/dev/null
NodeName=n[1-2] Name=gpu File=/dev/zero
"""


@dataclass(frozen=True)
class Cluster:
    """Commands of the running cluster."""

    folder: Path

    def environment(self, **extra: str) -> dict[str, str]:
        system = {"SLURM_CONF": str(self.folder / "slurm.conf"), "SSGEN_PYTHON": sys.executable}
        both = environment(**system, **extra)
        return both | {"PATH": f"{both['PATH']}:/usr/sbin:/sbin"}

    def run(self, *command: str, **extra: str) -> str:
        done = subprocess.run(
            command, env=self.environment(**extra), cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **extra: str) -> str:
        """Hand a script of `slurm/` to sbatch on two nodes; the job's id."""
        log = self.folder / "job-%j.log"
        chosen = ("--parsable", "--nodes=2", f"--output={log}", *options)
        return self.run("sbatch", *chosen, f"slurm/{script}", *arguments, **extra)

    def log(self, job: str) -> str:
        file = self.folder / f"job-{job}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def show(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, job: str, condition: Callable[[], bool], timeout: float = 150) -> None:
        """Poll; a job that ends first, or the time, is an error with the job's log."""
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.show(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"), (state, self.log(job))
            assert time.monotonic() < deadline, (state, self.log(job))
            time.sleep(0.3)

    def finish(self, job: str, timeout: float = 150) -> dict[str, str]:
        """Wait for the end of the job, over its restarts; what SLURM knows of it then."""
        deadline = time.monotonic() + timeout
        while True:
            facts = self.show(job)
            if facts["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"):
                return facts
            assert time.monotonic() < deadline, (facts, self.log(job))
            time.sleep(0.3)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM) is None]
    if missing:
        text = LEFT_OUT.format(", ".join(missing))
        if os.environ.get("SSGEN_REQUIRE_CLUSTER"):
            pytest.fail(text)
        pytest.skip(text)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with daemons(cluster):
        yield cluster


@contextlib.contextmanager
def daemons(cluster: Cluster) -> Iterator[None]:
    """All of them, in the foreground, until the end."""
    folder = cluster.folder
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(3)]
    text = CONFIG.format(folder=folder, ports=ports, user=getpass.getuser(), host=socket.gethostname())
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "gres.conf").write_text(GRES, encoding="utf-8")
    cluster.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
    munged = [
        *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    started: list[subprocess.Popen[bytes]] = []
    with open(folder / "daemons.log", "wb") as log:
        try:
            for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
                started.append(
                    subprocess.Popen(command, env=cluster.environment(), stdout=log, stderr=log, start_new_session=True)
                )
                time.sleep(0.5)
            _wait_for_nodes(cluster, started)
            yield
        finally:
            with contextlib.suppress(Exception):
                _end_jobs(cluster)
            for daemon in reversed(started):
                daemon.send_signal(signal.SIGTERM)
            for daemon in started:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(daemon.pid, signal.SIGKILL)


def _wait_for_nodes(cluster: Cluster, started: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if cluster.run("sinfo", "-h", "-p", "normal", "-t", "idle", "-o", "%D") == "2":
                return
        logs = {file.name: file.read_text(errors="replace")[-2000:] for file in cluster.folder.glob("*.log")}
        assert all(daemon.poll() is None for daemon in started), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.3)


def _end_jobs(cluster: Cluster) -> None:
    cluster.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
    cluster.run("scancel", f"--user={getpass.getuser()}")
    deadline = time.monotonic() + 30
    while cluster.run("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.5)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    make_inputs(folder)
    return folder

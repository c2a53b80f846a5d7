"""What `srun` says about a rank, in the variables that torch and DeepSpeed read."""

from __future__ import annotations

import os
import re


def map_slurm() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from an `srun` step's environment.

    Only inside `srun` (SLURM_STEP_NODELIST): the batch script itself also sees SLURM_PROCID, always 0.
    """
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(_slurm_counts(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])
    env.setdefault("MASTER_ADDR", _first_slurm_host(env["SLURM_STEP_NODELIST"]))
    # Jobs that share a node must not share a port, nor take one that the system gives to connections (from 32768 on).
    env.setdefault("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000))


def _slurm_counts(text: str) -> list[int]:
    """One number a node: `4(x2),3` is 4, 4, 3."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _first_slurm_host(nodes: str) -> str:
    """The first host: gpu07 of `gpu[07-08,12],login1`. scontrol would know, but containers rarely have it."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]

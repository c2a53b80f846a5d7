"""Ranks from SLURM's variables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssgen_ds.distributed import map_slurm

STEP = {
    "SLURM_JOB_ID": "40017",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No rank and no SLURM; `scontrol` is a script that answers as SLURM does for two nodes."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith("SLURM_")] + list(OURS):
        os.environ.pop(name, None)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    os.environ["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return monkeypatch


def mapped() -> dict[str, str]:
    map_slurm()
    return {name: os.environ[name] for name in OURS if name in os.environ}


def test_a_task_of_srun_gets_its_rank(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(STEP)
    assert mapped() == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20017",  # 20000 + 40017 % 20000
    }


def test_a_batch_script_is_not_rank_0_of_anything(environment: pytest.MonkeyPatch) -> None:
    os.environ.update({name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0"})
    assert mapped() == {}


def test_a_launcher_inside_srun_and_a_given_address_win(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(STEP)
    os.environ.update(MASTER_ADDR="10.0.0.1", MASTER_PORT="29501")
    assert mapped()["MASTER_ADDR"] == "10.0.0.1" and mapped()["MASTER_PORT"] == "29501"
    os.environ.update(RANK="3", WORLD_SIZE="4")
    assert mapped()["RANK"] == "3"
    assert mapped()["WORLD_SIZE"] == "4"

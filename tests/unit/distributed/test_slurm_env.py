"""Ranks from SLURM's variables."""

from __future__ import annotations

import os

import pytest

from ssgen_ds.distributed.slurm_env import map_slurm

STEP = {
    "SLURM_JOB_ID": "40017",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No rank and no SLURM."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith("SLURM_")] + list(OURS):
        os.environ.pop(name, None)
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
        "MASTER_PORT": "12017",  # 12000 + 40017 % 20000
    }


@pytest.mark.parametrize(("node", "ranks"), [("0", "4"), ("1", "4"), ("2", "3"), ("3", "12")])
def test_ranks_may_be_spread_unevenly(environment: pytest.MonkeyPatch, node: str, ranks: str) -> None:
    os.environ.update(STEP, SLURM_STEP_TASKS_PER_NODE="4(x2),3,12", SLURM_NODEID=node)
    assert mapped()["LOCAL_WORLD_SIZE"] == ranks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07,09-12],login1", "gpu07"),
        ("rack[2-3]-gpu[10-12]-ib", "rack2-gpu10-ib"),
        ("node-a,gpu[1-2]", "node-a"),
    ],
)
def test_the_first_node_is_the_rendezvous(environment: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    os.environ.update(STEP, SLURM_STEP_NODELIST=nodes)
    assert mapped()["MASTER_ADDR"] == first


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

"""Two nodes without SLURM: each node starts its own ranks. Here both nodes are this machine, one rank each."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.cluster.runs import LIMIT, recipe_file, reference
from tests.e2e.test_launchers import same_training
from tests.support.launch import Finished, finish, free_port, start


def torchrun(port: str, node: int, *arguments: str) -> list[str]:
    """Two nodes of one rank that meet at a c10d rendezvous."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", f"--node-rank={node}"),
        *("-m", "ssgen_ds.train", *arguments),
    ]


def deepspeed(hosts: Path, port: str, node: int, *arguments: str) -> list[str]:
    return [
        *(str(Path(sys.executable).parent / "deepspeed"), "--no_ssh", "--node_rank", str(node)),
        *("--hostfile", str(hosts), "--master_addr", "127.0.0.1", "--master_port", port),
        *("--module", "ssgen_ds.train", *arguments),
    ]


def both(commands: list[list[str]]) -> list[Finished]:
    processes = [start(command) for command in commands]
    return [finish(process, LIMIT) for process in processes]


@pytest.fixture(scope="module")
def hosts(inputs: Path) -> Path:
    file = inputs / "hostfile"
    file.write_text("first slots=1\nsecond slots=1\n")
    return file


def test_torchrun_on_two_nodes(inputs: Path) -> None:
    recipe, port = str(recipe_file(inputs, "c10d")), str(free_port())
    results = both([torchrun(port, node, recipe) for node in (0, 1)])
    assert [result.returncode for result in results] == [0, 0], results
    assert same_training(inputs / "runs" / "c10d", reference(inputs))


def test_deepspeed_on_two_nodes_without_ssh(inputs: Path, hosts: Path) -> None:
    recipe, port = str(recipe_file(inputs, "no-ssh")), str(free_port())
    results = both([deepspeed(hosts, port, node, recipe) for node in (0, 1)])
    assert [result.returncode for result in results] == [0, 0], results
    assert same_training(inputs / "runs" / "no-ssh", reference(inputs))


def test_a_node_that_does_not_come_is_named(inputs: Path, hosts: Path) -> None:
    """One of the two nodes is never started: a clear end within seconds, not a wait of half an hour."""
    began = time.monotonic()
    command = deepspeed(hosts, str(free_port()), 0, str(recipe_file(inputs, "lonely")), "recovery.rendezvous=5")
    (result,) = both([command])
    assert result.returncode == 2, result
    assert "1 of 2 ranks did not come within 5 s: 1; here are 1 on " in result.stderr, result
    assert time.monotonic() - began < 60
    assert not (inputs / "runs" / "lonely").exists()


def test_two_nodes_with_the_same_rank_are_refused(inputs: Path, hosts: Path) -> None:
    recipe, port = str(recipe_file(inputs, "doubled")), str(free_port())
    processes = [start(deepspeed(hosts, port, 0, recipe, "recovery.rendezvous=8")) for _ in range(2)]
    results = [finish(process, LIMIT) for process in processes]
    assert [result.returncode for result in results] == [2, 2], results
    said = "".join(result.stderr for result in results)
    assert "there is a rank 0 already" in said or "is in use" in said, said


def test_a_recipe_that_one_node_does_not_see_is_named_on_both(inputs: Path, hosts: Path) -> None:
    """The folder of the recipe is not shared: the node that has it does not wait for the other."""
    port, began = str(free_port()), time.monotonic()
    recipe, missing = recipe_file(inputs, "here-only"), inputs / "nowhere.yaml"
    first, second = both([deepspeed(hosts, port, node, str(file)) for node, file in ((0, recipe), (1, missing))])
    assert (first.returncode, second.returncode) == (2, 2), (first, second)
    for result in (first, second):
        assert "rank 1 on " in result.stderr and f"recipe {missing}: no such file" in result.stderr, result
    assert time.monotonic() - began < 60
    assert not (inputs / "runs" / "here-only").exists()

"""The ranks meet, or are told why not, within seconds."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ssgen_ds.distributed.job_store import JobStore
from ssgen_ds.distributed.rendezvous import Place, join, misfits
from ssgen_ds.errors import UserError


def place(rank: int, size: int = 2, gpus: int = 0, host: str | None = None, local: int = 1, gpu: str = "") -> Place:
    return Place(rank, size, 0, local, gpus, host or f"n{rank}", gpu)


@pytest.fixture
def port(monkeypatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


def outcomes(places: list[Place], seconds: float) -> list[str]:
    """What each rank is told; "" when it has joined."""
    stores = []

    def one(where: Place) -> str:
        try:
            stores.append(join(where, seconds))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_ranks_that_fit():
    assert misfits([place(0), place(1)], 2, 5) == []
    assert misfits([place(rank, 4, 2, f"n{rank // 2}", 2) for rank in range(4)], 4, 5) == []


def test_each_rank_may_see_its_own_gpu_only():
    own = [place(rank, 4, 1, f"n{rank // 2}", 2, gpu=f"GPU-{rank}") for rank in range(4)]
    assert misfits(own, 4, 5) == []
    shared = [place(rank, 4, 1, f"n{rank // 2}", 2, gpu=f"GPU-{rank // 2}") for rank in range(4)]
    assert [problem.partition(",")[0] for problem in misfits(shared, 4, 5)] == [
        "n0 has 1 visible GPUs",
        "n1 has 1 visible GPUs",
    ]


@pytest.mark.parametrize(
    ("places", "size", "parts"),
    [
        ([place(0, 4), place(3, 4, host="n0")], 4, ["2 of 4 ranks did not come within 5 s: 1, 2; here are 2 on n0"]),
        ([place(0, 2), place(1, 3)], 2, ["WORLD_SIZE differs between the ranks: 2, 3"]),
        ([place(0, 2, 1, "a", 2), place(1, 2, 1, "a", 2)], 2, ["a has 1 visible GPUs, but 2 ranks were started there"]),
        ([place(0, 2, 8), place(1, 2, 4)], 2, ["different numbers of visible GPUs: n0 8, n1 4"]),
        ([place(0, 2, 8), place(1, 2, 0)], 2, ["different numbers of visible GPUs: n0 8, n1 0"]),
    ],
)
def test_misfits_are_named(places, size, parts):
    problems = "\n".join(misfits(places, size, 5))
    for part in parts:
        assert part in problems


def test_many_missing_ranks_are_not_all_listed():
    (problem,) = misfits([place(0, 20)], 20, 5)
    assert "1, 2, 3, 4, 5, 6, 7, 8 and 11 more" in problem


def test_two_ranks_meet(port):
    assert outcomes([place(0), place(1)], 10) == ["", ""]


def test_uneven_nodes_are_refused_on_every_rank(port):
    told = outcomes([place(0, gpus=8), place(1, gpus=4)], 10)
    assert told[0] == told[1]
    assert "different numbers of visible GPUs" in told[0]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_problem_of_one_rank_is_told_to_all(port, wrong):
    began = time.monotonic()
    places = [replace(place(rank), problem="recipe r.yaml: no such file" * (rank == wrong)) for rank in (0, 1)]
    told = outcomes(places, 60)
    assert told == [f"rank {wrong} on n{wrong}: recipe r.yaml: no such file"] * 2
    assert time.monotonic() - began < 10


def test_a_problem_of_all_ranks_is_told_as_if_alone(port):
    assert outcomes([replace(place(rank), problem="a wrong key") for rank in (0, 1)], 60) == ["a wrong key"] * 2


def test_a_problem_is_told_though_a_rank_does_not_come(port, monkeypatch):
    monkeypatch.setattr("ssgen_ds.distributed.rendezvous._GRACE_SECONDS", 1.0)
    began = time.monotonic()
    assert outcomes([place(0, 3), replace(place(2, 3), problem="a wrong key")], 60) == ["rank 2 on n2: a wrong key"] * 2
    assert time.monotonic() - began < 10


def test_a_slow_rank_still_hears_why(port, monkeypatch):
    """Rank 0 does not take the store away before: the other would see a broken connection and no reason."""
    get = JobStore.get

    def slow(store, *keys, seconds=0.0):
        found = get(store, *keys, seconds=seconds)
        if keys == ("answer",) and threading.current_thread() is not first:
            time.sleep(1)
        return found

    told = []

    def rank_0() -> None:
        try:
            join(place(0, gpus=8), 10)
        except UserError as error:
            told.append(str(error))

    first = threading.Thread(target=rank_0)
    monkeypatch.setattr(JobStore, "get", slow)
    first.start()
    with pytest.raises(UserError, match="different numbers of visible GPUs") as caught:
        join(place(1, gpus=4), 10)
    first.join(30)
    assert told == [str(caught.value)]


def test_a_missing_rank_is_named_within_the_limit(port):
    began = time.monotonic()
    (told,) = outcomes([place(0)], 2)
    assert "1 of 2 ranks did not come within 2 s: 1; here are 1 on n0" in told
    assert time.monotonic() - began < 10


def test_a_doubled_rank_is_refused(port):
    told = outcomes([place(0), place(1), place(1, host="twin")], 10)
    assert told[0] == ""
    assert sorted(map(bool, told[1:])) == [False, True]
    assert "there is a rank 1 already, on" in "".join(told) and "--node_rank" in "".join(told)


def test_nobody_at_the_rendezvous(port):
    began = time.monotonic()
    (told,) = outcomes([place(1)], 2)
    assert f"rank 1 on n1: no rendezvous at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within 2 s" in told
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_without_an_address(port, monkeypatch, rank):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    (told,) = outcomes([place(rank)], 5)
    assert f"rank {rank} on n{rank}: the rendezvous host MASTER_ADDR=no-such-host.invalid has no address" in told


def test_a_port_in_use(port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        (told,) = outcomes([place(0)], 5)
    assert f"port {port} is in use" in told

"""What is wrong with the ranks, from what is known of them; and real watchdogs over a real store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ssgen_ds.distributed.watchdog import SETUP_PATIENCE, Beat, judge
from ssgen_ds.recipe.schema import RecoveryConfig
from tests.support.launch import environment

LIMITS = RecoveryConfig(rank_silence=10, collective_timeout=100)


def beat(rank: int, silent: float = 0.0, idle: float = 0.0, place: str = "backward of step 3", setup: bool = False):
    return Beat(rank, f"n{rank}", place, setup, idle, silent)


def test_all_is_well():
    assert judge([beat(0, 10, 100), beat(1, 0, 500)], LIMITS) is None


def test_a_silent_rank_is_named_with_its_phase_and_who_waits():
    text = judge([beat(0, place="optimizer of step 3"), beat(1, silent=12)], LIMITS)
    assert text == (
        "rank 1 on n1: no sign of life for 12 s, last in backward of step 3 (rank 0 waits in optimizer of step 3)"
    )


def test_many_silent_ranks_are_not_all_listed():
    text = judge([beat(rank, silent=11) for rank in range(10)], LIMITS)
    assert text.count("no sign of life") == 8
    assert text.endswith(" and 2 more")


def test_no_progress_names_the_phases():
    beats = [beat(0, idle=101), beat(1, idle=150, place="pass of step 4"), beat(2, idle=130)]
    assert judge(beats, LIMITS) == (
        "no rank has made progress for 101 s: ranks 0, 2 in backward of step 3; rank 1 in pass of step 4"
    )


def test_one_rank_that_works_is_progress():
    assert judge([beat(0, idle=1000), beat(1, idle=99)], LIMITS) is None


def test_who_sees_rank_0_alone_judges_its_silence_only():
    assert judge([beat(0, idle=1e6)], LIMITS, knows_all=False) is None
    assert "no sign of life" in judge([beat(0, silent=11)], LIMITS, knows_all=False)


def test_preparing_may_take_longer():
    assert judge([beat(0, idle=101, setup=True), beat(1, idle=101)], LIMITS) is None
    assert "no rank" in judge([beat(0, idle=100 * SETUP_PATIENCE + 1, setup=True), beat(1, idle=1e6)], LIMITS)


PROGRAM = """
import os, socket, sys, time
from ssgen_ds.recipe.schema import RecoveryConfig
from ssgen_ds.distributed.job_store import StoreServer, connect_within
from ssgen_ds.distributed.phases import Phases
from ssgen_ds.distributed.signals import StopFlag
from ssgen_ds.distributed.watchdog import Watchdog
rank, port, action = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if rank == 0:
    server = StoreServer(socket.create_server(("127.0.0.1", port)), b"secret")
store = connect_within(("127.0.0.1", port), b"secret", 60)
store.put(f"here{rank}", "")
store.get(f"here{1 - rank}", seconds=60)  # imports may take one longer than a rank may be silent
phases, stop = Phases(rank), StopFlag()
limits = RecoveryConfig(rank_silence=3, collective_timeout=60)
dog = Watchdog(rank, 2, rank, f"n{rank}", store, phases, stop, limits, launched=False)
dog.start()
with phases.enter("backward", 7):
    print("ready", flush=True)
    time.sleep(2.5)
    if action == "fail" and rank == 1:
        dog.fail("rank 1 on n1: it broke")
        sys.exit(5)
    if action == "fail-main" and rank == 0:
        dog.fail("rank 0 on n0: it broke")
        sys.exit(5)
    if action == "ask" and rank == 1:
        stop.is_set = True
    for _ in range(150):
        time.sleep(0.1)
        if stop.is_set:
            print("stop", flush=True)
            time.sleep(2)
            break
"""


def pair(action: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port, action],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    results = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        results.append((process.returncode, out, err))
    return results


@pytest.mark.parametrize(("action", "broken"), [("fail", 1), ("fail-main", 0)])
def test_a_rank_that_fails_takes_the_other_along_at_once(action, broken):
    results = ends(pair(action))
    assert results[broken][0] == 5, "its own error is the one to show"
    assert results[1 - broken][0] == 1
    said = results[0][2] if broken == 1 else ""  # rank 0 speaks for all, when it is not the broken one
    assert said == ("error: rank 1 on n1: it broke\n" if broken == 1 else "")


def test_a_stop_reaches_the_other_rank():
    results = ends(pair("ask"))
    assert [(code, out) for code, out, _ in results] == [(0, "ready\nstop\n")] * 2


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_by_the_other(stopped):
    processes = pair("wait")
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    time.sleep(2)  # a beat or two
    os.kill(processes[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    other = processes[1 - stopped]
    _, err = other.communicate(timeout=60)
    assert time.monotonic() - began < 12
    processes[stopped].kill()
    processes[stopped].communicate()
    assert other.returncode == 1
    if stopped == 1:
        assert "error: rank 1 on n1: no sign of life for" in err and "last in backward of step 7" in err
    else:
        assert "error: rank 0" in err and "backward of step 7" in err

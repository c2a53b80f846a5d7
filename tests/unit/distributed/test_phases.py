"""Where a rank is, and the faults that strike there."""

from __future__ import annotations

import errno
import os
import signal
import time
from unittest import mock

import pytest

from ssgen_ds.distributed.phases import Fault, Phases, parse_faults, phases_from_environment
from ssgen_ds.errors import UserError


def test_faults_are_read():
    assert parse_faults("kill@backward:1:4") == [Fault("kill", "backward", 1, 4)]
    assert parse_faults("delay=2.5@pass:0:1, raise@save:1:2") == [
        Fault("delay=2.5", "pass", 0, 1),
        Fault("raise", "save", 1, 2),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "kill", "kill@backward", "kill@backward:1", "kill@backward:x:1", "explode@pass:0:1", "delay@pass:0:1"),
        *("delay=long@pass:0:1", "kill=9@pass:0:1", "kill@pass:0:1,", "kill@pass:0:1:2"),
    ],
)
def test_a_fault_of_another_form_is_refused(text):
    with pytest.raises(UserError, match=r"SSGEN_FAULT: .* is not kind@phase:rank:step with a kind of kill"):
        parse_faults(text)


def test_phases_nest_and_the_step_is_kept():
    phases = Phases()
    assert phases.place == "start"
    with phases.enter("train", 3):
        with phases.enter("backward"):
            assert (phases.place, phases.names) == ("backward of step 3", ("start", "train", "backward"))
        assert phases.place == "train of step 3"
    assert phases.place == "start"


def test_the_innermost_phase_of_an_error_is_kept():
    phases = Phases()
    with pytest.raises(KeyError), phases.enter("train", 3), phases.enter("backward"):
        raise KeyError
    assert phases.failed_in == "backward of step 3"
    with pytest.raises(ValueError, match="other"), phases.enter("save", 4):
        raise ValueError("other")
    assert phases.failed_in == "save of step 4"


def test_idle_seconds():
    now = [10.0]
    phases = Phases(clock=lambda: now[0])
    now[0] = 14.0
    assert phases.seconds == 4.0
    phases.tick()
    assert phases.seconds == 0.0
    now[0] = 15.0
    with phases.enter("pass"):
        assert phases.seconds == 0.0
        now[0] = 17.0
    assert phases.seconds == 0.0, "leaving is progress, too"


def test_a_fault_strikes_once_at_its_place_and_rank_and_step():
    phases = Phases(1, parse_faults("raise@backward:1:2"))
    for name, step in (("forward", 2), ("backward", 1)):
        with phases.enter(name, step):
            pass
    other = Phases(0, parse_faults("raise@backward:1:2"))
    with other.enter("backward", 2):
        pass
    with pytest.raises(RuntimeError, match="injected in backward at step 2"), phases.enter("backward", 2):
        pytest.fail("it must not get inside")
    with phases.enter("backward", 2):
        pass


@pytest.mark.parametrize(("kind", "code"), [("enospc", errno.ENOSPC), ("eacces", errno.EACCES)])
def test_errors_of_the_disk(kind, code):
    phases = Phases(0, parse_faults(f"{kind}@shard:0:1"))
    with pytest.raises(OSError, match="injected in shard") as caught, phases.enter("shard", 1):
        pass
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("kind", "number"),
    [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP), ("term", signal.SIGTERM), ("usr1", signal.SIGUSR1)],
)
def test_signals_go_to_this_process(kind, number):
    with mock.patch.object(os, "kill") as kill:
        Fault(kind, "pass", 0, 1).strike()
    kill.assert_called_once_with(os.getpid(), number)


def test_a_delay():
    with mock.patch.object(time, "sleep") as sleep:
        Fault("delay=2.5", "pass", 0, 1).strike()
    sleep.assert_called_once_with(2.5)


def test_unset_it_costs_nothing(monkeypatch):
    monkeypatch.delenv("SSGEN_FAULT", raising=False)
    phases = phases_from_environment(0)
    with mock.patch.object(Phases, "_strike") as strike, phases.enter("backward", 1):
        phases.tick("pass")
    strike.assert_not_called()
    monkeypatch.setenv("SSGEN_FAULT", "kill@pass:0:1")
    assert phases_from_environment(0).faults

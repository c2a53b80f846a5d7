"""Stop signals: recorded here, kept from the processes that are started meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ssgen_ds.distributed.signals import STOP_SIGNALS, shielded_children, stop_on_signals


@pytest.fixture(autouse=True)
def hangups_are_heeded():
    """Tests that are started under nohup ignore them, and so would the processes of the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1)"], stdout=-1)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_the_whole_job_spares_the_children_and_is_not_lost(number):
    with stop_on_signals() as stop:
        with shielded_children():
            shielded = child()
            assert shielded.stdout.readline() == b"up\n"
            shielded.send_signal(number)
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.is_set
        plain = child()
        assert plain.stdout.readline() == b"up\n"
        plain.send_signal(number)
        assert shielded.wait(20) == 0
        assert plain.wait(20) != 0, "without the shield it would have died"


def test_the_handlers_and_the_mask_are_put_back():
    before = signal.getsignal(signal.SIGUSR1), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with stop_on_signals(), shielded_children():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOP_SIGNALS)
    assert (signal.getsignal(signal.SIGUSR1), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outlives_its_terminal():
    """What is printed after the terminal has gone must not end the run before its checkpoint."""
    program = (
        "import signal, sys, time\n"
        "from ssgen_ds.distributed.signals import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    print('up', flush=True)\n"
        "    while not stop.is_set: time.sleep(0.01)\n"
        "    print('saved', flush=True)\n"
        "sys.exit(75)\n"
    )
    main, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(main, 2) == b"up"
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 75

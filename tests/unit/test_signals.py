"""Stop signals: recorded here, kept from the processes that are started meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ssgen_ds.signals import STOP_SIGNALS, shielded_children, stop_on_signals


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

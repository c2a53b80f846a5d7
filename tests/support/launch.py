"""Start real ranks with an outer timeout; nothing survives it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def environment(**extra: str) -> dict[str, str]:
    """This process's environment for ranks on a CPU, with the test interpreter's scripts first in PATH."""
    scripts = str(Path(sys.executable).parent)
    return {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def start(command: list[str], **extra: str) -> subprocess.Popen[str]:
    """Start a command in its own session."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> Finished:
    """Wait for it, or kill its whole session and fail."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end within {timeout} s\n{stdout[-4000:]}\n{stderr[-8000:]}") from None
    return Finished(process.returncode, stdout, stderr)


def run(command: list[str], timeout: float, **extra: str) -> Finished:
    return finish(start(command, **extra), timeout)


def torchrun(module: str, *arguments: str, ranks: int = 2) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        *("-m", module, *arguments),
    ]


def deepspeed(module: str, *arguments: str, ranks: int = 2) -> list[str]:
    """Its default port is 29500 for everybody: take a free one."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(free_port())
    return [launcher, "--num_accelerators", str(ranks), "--master_port", port, "--module", module, *arguments]


def free_port() -> int:
    """One that nobody listens at, below those that the system gives to connections: it may be used seconds later."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port

"""What recovery costs on a real model: the pause of a checkpoint, and the ways back from a signal and from a kill.

    python -m bench.recovery [--ranks 2] [--recipe recipes/smoke.yaml] [key=value ...]

Three starts of one run under the deepspeed launcher: the first gets SIGUSR1 as a generation begins, the second is
killed with all its ranks, the third ends the run. Writes bench/results/recovery.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ssgen_ds.run.logbook import read_rows

RESULTS = Path(__file__).parent / "results"
LIMIT = 1800.0  # seconds a start may take


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of checkpoints and recovery.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="recipes/smoke.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args()
    run_dir = Path("runs/bench-recovery")
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = ["checkpoint.every=1", f"output_dir={run_dir}", *options.overrides]
    result = measure(options.recipe, overrides, options.ranks, run_dir)
    result |= {"recipe": options.recipe, "overrides": options.overrides, "ranks": options.ranks}
    result |= {"cores": os.cpu_count(), "machine": platform.machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recovery.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def measure(recipe: str, overrides: list[str], ranks: int, run_dir: Path) -> dict[str, Any]:
    """Seconds and bytes."""
    # The pass of step 3 on rank 1 gets the signal: a generation has just begun.
    first = start(recipe, overrides, ranks, SSGEN_FAULT="usr1@pass:1:3")
    wait_for(first, lambda: len(rows_of(run_dir)) >= 2)
    last_row = time.time()
    code = first.wait(LIMIT)
    signalled = time.time() - last_row  # to the end of the processes: it holds the generation's begin, too
    assert code == 75, code
    second = start(recipe, overrides, ranks)
    began = time.time()
    wait_for(second, lambda: len(rows_of(run_dir)) >= 3)
    resumed = time.time() - began
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    third = start(recipe, overrides, ranks)
    assert third.wait(LIMIT) == 0
    rows = rows_of(run_dir)
    pauses = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
    return {
        "checkpoint_seconds": round(sum(pauses) / len(pauses), 3),
        "checkpoint_bytes": max(row["checkpoint_bytes"] for row in rows if "checkpoint_bytes" in row),
        "step_seconds": round(sum(row["step_seconds"] for row in rows) / len(rows), 3),
        "signal_to_exit_seconds": round(signalled, 3),
        "start_to_first_new_step_seconds": round(resumed, 3),
        "steps": [row["step"] for row in rows],
    }


def start(recipe: str, overrides: list[str], ranks: int, **extra: str) -> subprocess.Popen[bytes]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    command = [*launcher, "--module", "ssgen_ds.train", recipe, *overrides]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(command, env=os.environ | {"PATH": path} | extra, start_new_session=True)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return read_rows(file) if file.is_file() else []


def wait_for(process: subprocess.Popen[bytes], happened: Any) -> None:
    deadline = time.time() + LIMIT
    while not happened():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.time() < deadline, "the run takes too long"
        time.sleep(0.05)


if __name__ == "__main__":
    main()

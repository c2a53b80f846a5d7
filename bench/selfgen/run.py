"""The command: start the workers, merge what they measured into the results file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.selfgen import table
from bench.selfgen.rows import NOT_MEASURED
from bench.selfgen.sizes import RANK_ROWS, ROWS, SINGLE_ROWS
from bench.selfgen.work import model_name, model_path, sizes_for
from ssgen_ds.errors import UserError

ROOT = Path(__file__).parents[2]
RANKS = 2


def bench_selfgen(model: str, rows: list[str] | None, as_json: bool) -> bool:
    """Measure the rows (None: all) and print everything that is known: JSON alone, or a table.

    Returns:
        whether all that was asked for could be measured.
    """
    rows = rows or list(ROWS)
    with redirect_stdout(sys.stderr):  # libraries print when they are imported
        results = run(model, rows)
    print(json.dumps(results, indent=1) if as_json else table.markdown(results))
    return all(results["rows"][row]["ours"] != NOT_MEASURED for row in rows)


def run(model: str, rows: list[str], results_dir: Path | None = None) -> dict[str, Any]:
    """Measure the rows, merge them into `selfgen-MODEL.json` and return all that it holds.

    Rows measured earlier stay; the others say that they were not measured, and why.

    Raises:
        UserError: unknown rows, or the peers are not installed.
    """
    check_rows(rows)
    results_dir = results_dir or ROOT / "bench" / "results"
    sizes = sizes_for(model)
    measured: dict[str, Any] = {}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_path(model, Path(folder) / "model")
        for group, ranks in ((SINGLE_ROWS, 1), (RANK_ROWS, RANKS)):
            wanted = [row for row in group if row in rows]
            if not wanted:
                continue
            out = Path(folder) / f"rows-{ranks}.json"
            problem = _work(path, json.dumps(asdict(sizes)), wanted, out, ranks, sizes.timeout_seconds)
            done = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
            measured |= {row: {**entry, "ranks": ranks, "threads": _threads(ranks)} for row, entry in done.items()}
            problems |= {row: problem for row in wanted if row not in done}
    file = results_dir / f"selfgen-{model_name(model)}.json"
    results = table.merge(table.read(file), model, measured, problems, asdict(sizes))
    table.write(file, results)
    return results


def check_rows(rows: list[str]) -> None:
    """Raise UserError for what would fail after minutes."""
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise UserError(f"--rows: unknown {', '.join(unknown) or 'nothing'}; choose from {','.join(ROWS)}")
    if "S5" in rows:
        from importlib.util import find_spec

        if find_spec("trl") is None:
            raise UserError("S5 needs the peer trl; run: pip install -c constraints.txt -e '.[bench]'")


def _threads(ranks: int) -> int:
    """Of each rank: what the caller has set, else the cores divided."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // ranks)))


def _work(path: str, sizes: str, rows: list[str], out: Path, ranks: int, timeout: float) -> str:
    """Run the rows in processes of their own; what went wrong, or ""."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "bench.selfgen.worker", path, sizes, ",".join(rows), str(out)]
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    process = subprocess.Popen(
        command,
        stdout=sys.stderr,  # standard output is the result's
        env={
            **{key: value for key, value in os.environ.items() if key not in dropped},
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(_threads(ranks)),
        },
        cwd=ROOT,
    )
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"no end within {timeout:g} s"
    finally:
        _end(process)
    return "" if code == 0 else f"the worker ended with exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a worker that is still running end; the launcher of ranks ends them first."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

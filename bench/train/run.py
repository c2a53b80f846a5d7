"""The command: every side in a process of its own, in turn; rows from medians; the results file."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.selfgen.table import describe_machine
from bench.train import gpu
from bench.train.peak import on_gpu
from bench.train.sizes import BARS, ROWS, WORK, Sizes
from ssgen_ds.errors import UserError

ROOT = Path(__file__).parents[2]
NOT_MEASURED = "not measured"


def bench_train(
    rows: list[str] | None, as_json: bool, sizes: Sizes | None = None, results_dir: Path | None = None
) -> bool:
    """Measure the rows (None: all) and print all that is known; whether what was asked for could be measured."""
    rows = rows or list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise UserError(f"--rows: unknown {', '.join(unknown)}; choose from {','.join(ROWS)}")
    file = (results_dir or ROOT / "bench" / "results") / ("train-gpu.json" if on_gpu() else "train-smollm2.json")
    sizes = sizes or Sizes()
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        earlier = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
        found = {row: MEASURES[row](sizes, Path(folder)) if row in rows else earlier.get(row) for row in ROWS}
        dtype = "bfloat16" if on_gpu() else "float32"
        stamp = {"machine": {**describe_machine(), "dtype": dtype}, "sizes": asdict(sizes)}
    entries = {}
    for row in ROWS:
        value = found[row] or {"ours": NOT_MEASURED, "why": "not asked for"}
        if row in rows and value["ours"] != NOT_MEASURED:
            value |= stamp
        entries[row] = {"work": WORK[row], "bar": BARS[row], **value}
    results = {"rows": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1) if as_json else markdown(results))
    return all(entries[row]["ours"] != NOT_MEASURED or row == "T3" for row in rows)


def side(name: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """What one worker found. Raises UserError when it failed: its own output says why."""
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    arguments = [name, json.dumps(asdict(sizes)), str(folder), str(out)]
    try:
        code = subprocess.run(
            [sys.executable, "-m", "bench.train.worker", *arguments],
            stdout=sys.stderr, env=env, cwd=ROOT, timeout=sizes.timeout_seconds, check=False,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"bench train: {name} did not end within {sizes.timeout_seconds:g} s") from None
    if code != 0 or not out.is_file():
        raise UserError(f"bench train: {name} ended with exit code {code}")
    return json.loads(out.read_text(encoding="utf-8"))


def t1(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Ours and TRL's in turn, as often as `repeats` says."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(sizes.repeats):
        place = folder / f"t1-{number}"
        place.mkdir()
        for name, runs in sides.items():
            runs.append(side(name, sizes, place))
            print(f"  {name}: {runs[-1]['tokens_per_second']:.1f} tokens/s", flush=True)
    rate, peak = (
        {name: statistics.median(run[key] for run in runs) for name, runs in sides.items()}
        for key in ("tokens_per_second", "peak_bytes")
    )
    faster, smaller = rate["ours"] / rate["trl"], peak["ours"] / peak["trl"]
    least, most = (1.0, 1.0) if on_gpu() else (1.15, 0.9)
    checks = {f"tokens/s >= {least:g}x": faster >= least, f"peak memory <= {most:g}x": smaller <= most}
    return {
        "ours": {"tokens/s": rate["ours"], "peak GiB": peak["ours"] / 2**30},
        "peer": {"TRL tokens/s": rate["trl"], "TRL peak GiB": peak["trl"] / 2**30},
        "ratio": {"tokens/s": faster, "peak memory": smaller},
        "checks": checks,
        "holds": all(checks.values()),
        "details": sides,
    }


def t2(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """BSS over SFT by task: XSum's prompts are more than twice its responses, FiQA's are shorter."""
    found = {
        f"{task} {method}": side(f"step-{task}-{method}", sizes, folder)
        for task in ("XSum", "FiQA")
        for method in ("sft", "bss")
    }
    seconds = {name: value["seconds"] for name, value in found.items()}
    ratio = {task: seconds[f"{task} bss"] / seconds[f"{task} sft"] for task in ("XSum", "FiQA")}
    checks = {"XSum <= 1.6x": ratio["XSum"] <= 1.6, "FiQA <= 2.2x": ratio["FiQA"] <= 2.2}
    return {
        "ours": {f"{task} s/step": seconds[f"{task} bss"] for task in ratio},
        "peer": {f"{task} SFT s/step": seconds[f"{task} sft"] for task in ratio},
        "ratio": ratio,
        "checks": checks,
        "holds": all(checks.values()),
        "details": found,
    }


def t3(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Only where a GPU is: LoRA beside TRL's, and QLoRA, which has no bar."""
    import torch

    if not on_gpu():
        return {"ours": NOT_MEASURED, "why": "no GPU at hand"}
    sides, missing = {}, []
    for name in ("ours", "trl", "qlora"):
        try:
            sides[name] = side(f"gpu-{name}", sizes, folder)
        except UserError as error:  # what the others have found is not lost
            missing.append(str(error))
    if missing:
        return {"ours": NOT_MEASURED, "why": "; ".join(missing), "details": sides}
    return gpu.table_row(sides, gpu.operations(sizes), torch.cuda.get_device_name())


def t4(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Calls against T, and memory against the number of examples."""
    found = side("growth", sizes, folder)
    calls = {int(length): count for length, count in found["calls"].items()}
    lengths = sorted(calls)
    few, many = (found["memory_mib"][str(number)] for number in sizes.examples)
    growth = (calls[lengths[-1]] / calls[lengths[0]]) / (lengths[-1] / lengths[0])
    checks = {"calls grow slower than T": growth < 1, "memory flat (within 64 MiB)": many - few <= 64}
    return {
        "ours": {**{f"calls at T={length}": calls[length] for length in lengths}, "MiB": few, "MiB at 10x": many},
        "ratio": {"calls over T": growth},
        "checks": checks,
        "holds": all(checks.values()),
        "details": found,
    }


MEASURES = {"T1": t1, "T2": t2, "T3": t3, "T4": t4}


def markdown(results: dict[str, Any]) -> str:
    """One line a row."""
    lines = ["| # | Work | Ours | Peer | Ratio | Bar | Holds |", "|---|---|---|---|---|---|---|"]
    for name, row in results["rows"].items():
        if row["ours"] == NOT_MEASURED:
            figures = [f"{NOT_MEASURED}: {row['why']}", "", "", row["bar"], NOT_MEASURED]
        else:
            missed = "; ".join(check for check, held in row["checks"].items() if not held)
            figures = [*(_figures(row.get(key, {})) for key in ("ours", "peer", "ratio")), row["bar"]]
            figures.append("yes" if row["holds"] else f"no: {missed}")
        lines.append(f"| {' | '.join([name, row['work'], *figures])} |")
    return "\n".join(lines)


def _figures(values: dict[str, float]) -> str:
    return "<br>".join(f"{key}: {value:.3g}" for key, value in values.items())

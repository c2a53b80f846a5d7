"""The results file: merged, written whole, shown as a Markdown table and as a plot."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.selfgen.rows import NOT_MEASURED, not_measured
from bench.selfgen.sizes import ROWS
from ssgen_ds.run.folder import describe_environment

PEERS = ("trl", "accelerate")  # beside what every run records


def read(file: Path) -> dict[str, Any]:
    """An earlier results file; empty where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def merge(
    earlier: dict[str, Any], model: str, measured: dict[str, Any], problems: dict[str, str], sizes: dict[str, Any]
) -> dict[str, Any]:
    """All rows: those just measured with the machine they ran on, those of earlier runs, and the missing ones.

    A row that failed now is not measured, whatever an earlier run found: the code may have changed since.
    """
    stamp = {"machine": describe_machine(), "sizes": sizes}
    rows = {}
    for name in ROWS:
        if name in measured:
            rows[name] = {**measured[name], **stamp}
        elif name in problems:
            rows[name] = not_measured(name, problems[name])
        else:
            rows[name] = earlier.get("rows", {}).get(name) or not_measured(name, "not asked for")
    return {"model": model, "rows": rows}


def describe_machine() -> dict[str, Any]:
    """Processor or GPU, threads and versions."""
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    found = describe_environment(
        device=torch.cuda.get_device_name() if on_gpu else _processor(),
        cores=len(os.sched_getaffinity(0)),
        dtype="float32",
    )
    del found["command"]
    found["packages"] |= {name: version(name) for name in PEERS if find_spec(name)}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(file: Path, results: dict[str, Any]) -> None:
    """The JSON file and, where passes were measured, the plot beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    points = results["rows"]["S1"].get("details", {}).get("passes")
    if points:
        plot(points, file.with_name(f"{file.stem}-passes.png"))


def markdown(results: dict[str, Any]) -> str:
    """One line a row: what was measured, ours, each peer with the ratio, the bar and whether it holds."""
    lines = ["| # | Work | Ours | Peers (ours is better by) | Bar | Holds |", "|---|---|---|---|---|---|"]
    for name, row in results["rows"].items():
        cells = [name, row["work"], _ours(row), _peers(row), row["bar"], _holds(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ours(row: dict[str, Any]) -> str:
    if row["ours"] == NOT_MEASURED:
        return NOT_MEASURED
    return "<br>".join(f"{case}: {figure:.3g}" for case, figure in row["ours"].items())


def _peers(row: dict[str, Any]) -> str:
    if row["peer"] == NOT_MEASURED:
        return NOT_MEASURED
    return "<br>".join(
        f"{case}: "
        + ", ".join(f"{name} {figure:.3g} ({row['ratio'][case][name]:.2g}x)" for name, figure in side.items())
        for case, side in row["peer"].items()
    )


def _holds(row: dict[str, Any]) -> str:
    if row["ours"] == NOT_MEASURED:
        return NOT_MEASURED
    if row["holds"] is None:
        return "reported"
    return "yes" if row["holds"] else "no: " + "; ".join(name for name, held in row["checks"].items() if not held)


def plot(points: list[dict[str, float]], file: Path) -> None:
    """Passes a row against mix_rate, a line for each T, beside the coins that sequential sampling would need."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, num_tokens in enumerate(sorted({point["num_tokens"] for point in points})):
        line = sorted((p for p in points if p["num_tokens"] == num_tokens), key=lambda p: p["mix_rate"])
        rates = [point["mix_rate"] for point in line]
        axes.plot(rates, [p["passes"] for p in line], "o-", color=f"C{number}", label=f"passes, T = {num_tokens}")
        axes.plot(rates, [p["coins"] for p in line], ":", color=f"C{number}", label=f"coin to coin, T = {num_tokens}")
    axes.set(xlabel="mix_rate", ylabel="model calls a row", ylim=(0, None))
    axes.set_title("Exact scheduled sampling in few passes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)

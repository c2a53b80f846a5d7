"""The plan as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.plan.memory import PHASES, MemoryPlan, Setting
from ssgen_ds.plan.sizes import Sizes

_TITLES = {"load": "loading", "generate": "generating", "train": "forward/backward", "optimizer": "update"}


def show(
    plan: MemoryPlan,
    sizes: Sizes,
    setting: Setting,
    hardware: Any,
    where: str,
    ok: bool,
    changes: list[str] | None,
    times: dict[str, Any] | None,
) -> None:
    """Counts, a table of GiB on one rank, the verdict, what to change, and seconds."""
    console = Console(highlight=False)
    quantised = f", {sizes.quantizable / 1e9:.2f}e9 of them in nf4" if setting.nf4 else ""
    console.print(f"model: {where}")
    console.print(f"parameters: {sizes.parameters / 1e9:.3f}e9{quantised}; trained: {sizes.trained / 1e9:.3f}e9")
    console.print(
        f"{setting.ranks} rank{'s' * (setting.ranks > 1)}, ZeRO-{setting.stage}, "
        f"{setting.micro_tokens} tokens a micro batch; {setting.memory / GIB:.1f} GiB a rank ({hardware.name})"
    )
    console.print(_memory_table(plan))
    if plan.host:
        need, there = plan.host_bytes * max(1, hardware.gpus) / GIB, hardware.host_memory / GIB
        known = f" of {there:.0f} that are there" if there < float("inf") else ""
        console.print(f"host memory of a node: {need:.0f} GiB{known} ({', '.join(plan.host)})")
    if setting.generates:
        console.print(f"self-generation: {plan.strategy}, {plan.cache_rows} sequences at once")
    if ok:
        console.print(f"[green]fits[/green]: {plan.highest / GIB:.1f} of {setting.memory / GIB:.1f} GiB")
    else:
        device = plan.highest > setting.memory
        what = f"{plan.highest / GIB:.1f} GiB, {setting.memory / GIB:.1f} are there" if device else "the host's memory"
        console.print(f"[red]does not fit[/red]: {what}")
        if changes is None:
            console.print("none of the usual changes is enough: more ranks, or a smaller model")
        else:
            console.print("it would with:  " + " ".join(changes))
    if times is None:
        console.print("seconds: the card is not known here; name it with --card, for instance --card H100")
    else:
        generation = f", a round's generation {times['round']:.1f} s" if setting.generates else ""
        console.print(f"a step {times['step']:.1f} s{generation} at the longest lengths; rate: {times['rate']}")


def _memory_table(plan: MemoryPlan) -> Table:
    """A column for each phase, a row for each kind of memory that some phase needs."""
    table = Table(title="GiB on one rank", title_justify="left")
    table.add_column("")
    phases = [phase for phase in PHASES if phase in plan.phases]
    for phase in phases:
        table.add_column(_TITLES[phase], justify="right")
    kinds = dict.fromkeys(kind for phase in phases for kind in plan.phases[phase])
    for kind in kinds:
        values = [plan.phases[phase].get(kind) for phase in phases]
        if any(values):
            table.add_row(kind, *(f"{value / GIB:.2f}" if value else "" for value in values))
    table.add_section()
    table.add_row("peak", *(f"{plan.peak(phase) / GIB:.2f}" for phase in phases))
    return table

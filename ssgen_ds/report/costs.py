"""Where a run spent its time and memory, and what generation cost: sums over metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssgen_ds.report.curves import Rows, total
from ssgen_ds.report.read_run import Run
from ssgen_ds.run.progress import duration

GIB = 2**30
_CHOICES = (("parameters while generating", "selfgen_strategy"), ("coins tried in a pass", "selfgen_block"))


@dataclass(frozen=True)
class CostBar:
    """One bar: its name, its value as text, and its length in percent of the sum (time) or the largest bar (memory)."""

    name: str
    text: str
    percent: float


def seconds_by_phase(run: Run) -> dict[str, float]:
    """The known seconds of training, generating, evaluating and saving, in that order."""
    evaluating = total(run.rows, "eval_seconds") + sum(one.content.get("seconds", 0) for one in run.during_training)
    seconds = {
        "train": total(run.rows, "step_seconds"),
        "generate": total(run.rows, "selfgen_seconds"),
        "evaluate": evaluating,
        "save": total(run.rows, "checkpoint_seconds"),
    }
    return {name: value for name, value in seconds.items() if value > 0}


def time_bars(run: Run) -> list[CostBar]:
    """Shares of the time in metrics.jsonl, which does not include starting and exporting."""
    seconds = seconds_by_phase(run)
    whole = sum(seconds.values())
    return [
        CostBar(name, f"{duration(value)}, {value / whole:.0%}", 100 * value / whole) for name, value in seconds.items()
    ]


def memory_bars(rows: Rows) -> list[CostBar]:
    """The peak of each phase, on the rank with the highest; one bar if only the overall peak is known."""
    names = {"train": "peak_train_bytes", "generate": "peak_generate_bytes", "optimizer": "peak_optimizer_bytes"}
    peaks = {name: _highest(rows, key) for name, key in names.items()}
    peaks = {name: peak for name, peak in peaks.items() if peak}
    if not peaks and (peak := _highest(rows, "peak_memory_bytes")):
        peaks = {"highest": peak}
    largest = max(peaks.values(), default=1.0)
    return [CostBar(name, f"{peak / GIB:.2f} GiB", 100 * peak / largest) for name, peak in peaks.items()]


def _highest(rows: Rows, key: str) -> float:
    return max((row[key] for row in rows if row.get(key)), default=0.0)


def generation_facts(run: Run) -> list[tuple[str, str]]:
    """What the sampler did in the whole run: (label, value)."""
    rows = [row for row in run.rows if row.get("selfgen_calls")]
    if not rows:
        return []
    facts = []
    passes = [row["selfgen_passes"] for row in rows if row["selfgen_passes"]]
    if passes:
        facts.append(("passes of a mixed context, first → last round", f"{passes[0]:.1f} → {passes[-1]:.1f}"))
    facts += [
        ("model calls", f"{total(rows, 'selfgen_calls'):,.0f}"),
        ("tokens computed", f"{total(rows, 'selfgen_token_forwards'):,.0f}"),
        ("tokens drawn, redraws included", f"{total(rows, 'selfgen_draws'):,.0f}"),
        ("tokens made final by a pass", f"{_mean(rows, 'selfgen_accepted_length'):.2f}"),
    ]
    if first := total(rows, "selfgen_first_draws"):
        facts.append(("guesses that were right", f"{total(rows, 'selfgen_guess_hits') / first:.0%}"))
    if total(rows, "selfgen_flips"):
        rate, bound = _mean(rows, "selfgen_flip_rate"), _mean(rows, "selfgen_flip_bound")
        facts.append(("redraws that changed the token; theory's bound", f"{rate:.0%}; {bound:.0%}"))
    facts.append(("draws that rounding may decide", f"{total(rows, 'selfgen_ties'):,.0f}"))
    if verified := total(rows, "selfgen_verified"):
        facts.append(("redrawn to verify; different", f"{verified:,.0f}; {total(rows, 'selfgen_mismatches'):,.0f}"))
    facts += [(label, str(rows[-1][key])) for label, key in _CHOICES if rows[-1].get(key)]
    return facts


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    """The mean over the rows in which the number is not 0."""
    values = [row[key] for row in rows if row[key]]
    return sum(values) / max(len(values), 1)

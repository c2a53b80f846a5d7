"""The training-inference gaps in gap/, before and after training: a sentence, a table and a figure for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssgen_ds.report.curves import Curve
from ssgen_ds.report.read_run import Run

COLUMNS = (
    ("NLL after gold", "nll_gold"),
    ("after its own", "nll_free"),
    ("gap", "gap_nll"),
    ("gap, first's contexts", "gap_nll_shared"),
    ("top-1 after gold", "accuracy_gold"),
    ("after its own", "accuracy_free"),
)

_OWN = "after its own tokens than after gold ones"


@dataclass(frozen=True)
class GapView:
    name: str  # the file's name without the suffix
    sentence: str
    caption: str
    rows: list[list[str]]  # each: a model, then the numbers of `COLUMNS`
    curves: list[Curve]


def view_gaps(run: Run) -> list[GapView]:
    """The gaps in the order of their files, gap.json first."""
    from ssgen_ds.report.gap_figure import gap_curves

    views = []
    for name, gap in run.gaps.items():
        rows = [[row["model"], *(_cell(row, key) for _, key in COLUMNS)] for row in gap["summary"]]
        examples = gap["num_examples"]
        caption = f"{examples} example{'s' * (examples != 1)} of {gap['data'].rpartition('/')[2]}"
        views.append(GapView(name, gap_sentence(run, gap), caption, rows, gap_curves(gap)))
    return views


def gap_sentence(run: Run, gap: dict[str, Any]) -> str:
    """The numbers in a sentence. Before: the model that training began with, else the first. After: this run."""
    rows = dict(zip([model["model"] for model in gap["models"]], gap["summary"], strict=True))
    models = list(rows)
    before = next((model for model in models if run.is_base(model)), models[0])
    after = next((model for model in models if run.is_own(model)), models[-1])
    old, new = rows[before], rows[after]
    if before == after:
        return f"A gold token costs {old['model']} {_more(old['gap_nll'])} nats {_OWN}."
    text = f"A gold token costs the model {_more(old['gap_nll'])} nats {_OWN} before training"
    if "change_gap_nll" not in new:
        return f"{text}, {_more(new['gap_nll'])} after it."
    low, high = new["change_gap_nll_low"], new["change_gap_nll_high"]
    change = f"{signed(new['change_gap_nll'])} [{signed(low)}, {signed(high)}]"
    shared = f"on the first model's contexts {_more(new['gap_nll_shared'])}"
    return f"{text}, {_more(new['gap_nll'])} after it, a change of {change}; {shared}."


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _more(gap: float) -> str:
    return f"{abs(gap):.3f} {'more' if gap >= 0 else 'less'}"


def _cell(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "–"
    return f"{row[key]:.1%}" if key.startswith("accuracy") else f"{row[key]:.3f}"

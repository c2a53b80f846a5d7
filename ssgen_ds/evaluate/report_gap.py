"""The training-inference gap of gap/gap.json, before and after training: a sentence, a table, one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssgen_ds.evaluate.curves import Curve
from ssgen_ds.evaluate.report_run import Run

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
    sentence: str
    caption: str
    rows: list[list[str]]  # a model, then the numbers of `COLUMNS`
    curves: list[Curve]


def view_gap(run: Run) -> GapView | None:
    """None where no gap was measured."""
    if run.gap is None:
        return None
    from ssgen_ds.evaluate.gap_figure import gap_curves

    summary = run.gap["summary"]
    rows = [[row["model"], *(_cell(row, key) for _, key in COLUMNS)] for row in summary]
    examples = run.gap["num_examples"]
    caption = f"{examples} example{'s' * (examples != 1)} of {run.gap['data'].rpartition('/')[2]}"
    return GapView(gap_sentence(run), caption, rows, gap_curves(run.gap))


def gap_sentence(run: Run) -> str:
    """Plain words with the numbers. Before: the model that training began with, else the first; after: this run."""
    assert run.gap is not None
    rows = dict(zip([model["model"] for model in run.gap["models"]], run.gap["summary"], strict=True))
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

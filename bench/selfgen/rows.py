"""What a row of the results is, and what each must show (docs/benchmarks.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

NOT_MEASURED = "not measured"

WORK = {
    "S1": "BSS contexts, T = 128, W = all: calls a batch",
    "S2": "same at the W that auto chose: token-forwards a response token",
    "S3": "same, one process, batch 8: seconds",
    "S4": "same, 2 ranks, ZeRO-3 left sharded, 4 rows a rank: seconds",
    "S5": "RAC drafts, 2 ranks, ZeRO-3: tokens per second",
    "S6": "second visit after training, the first visit's output as the guess: calls a batch",
}
BARS = {
    "S1": "<= 6 at .1, <= 12 at .25; at most half of (b); tokens identical",
    "S2": "<= 2.0 at .1, <= 3.5 at .25",
    "S3": ">= 1.5x (a) at .1, never below 0.95x the better of (a), (b)",
    "S4": ">= 12x (a) at .1, >= 5x at .25, never below (b); parameters stay sharded",
    "S5": ">= 1.5x gathered, >= 3x sharded; no hang on uneven EOS",
    "S6": "reported",
}


@dataclass
class Row:
    """One measured row.

    ours: case -> figure. peer: case -> peer -> figure. ratio: case -> peer -> how many times better ours is.
    checks: what the bar asks for, one by one. details: everything else worth keeping.
    """

    ours: dict[str, float]
    peer: dict[str, dict[str, float]]
    ratio: dict[str, dict[str, float]]
    checks: dict[str, bool]
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self, name: str) -> dict[str, Any]:
        holds = all(self.checks.values()) if self.checks else None  # S6 only reports
        return {"work": WORK[name], "bar": BARS[name], "holds": holds, **_rounded(asdict(self))}


def not_measured(name: str, why: str) -> dict[str, Any]:
    """The entry of a row that nobody has measured."""
    nothing = dict.fromkeys(("ours", "peer", "ratio"), NOT_MEASURED)
    return {"work": WORK[name], "bar": BARS[name], "holds": None, **nothing, "why": why}


def times_better(ours: dict[str, float], peer: dict[str, dict[str, float]], higher_is_better: bool) -> dict[str, Any]:
    """Ratios above 1 are in our favour."""
    return {
        case: {
            name: ours[case] / figure if higher_is_better else figure / ours[case]
            for name, figure in peer[case].items()
        }
        for case in ours
    }


def _rounded(value: Any) -> Any:
    """Floats to four significant digits, in nested dictionaries and lists."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value

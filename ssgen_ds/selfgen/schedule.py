"""How the mix rate grows over optimizer steps (Bengio et al. 2015 for the shapes)."""

from __future__ import annotations

import math


def mix_rate_at(step: int, total_steps: int, peak: float, schedule: str) -> float:
    """Mix rate of 0-based optimizer step `step`; never above `peak`.

    constant: the peak throughout. linear and cosine: from 0 at the first step to the peak at the last.
    inverse_sigmoid: a logistic from 0 to the peak, steepest in the middle.
    """
    if schedule == "constant":
        return peak
    progress = step / (total_steps - 1) if total_steps > 1 else 1.0
    if schedule == "linear":
        share = progress
    elif schedule == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * progress))
    elif schedule == "inverse_sigmoid":
        start, end = _logistic(-0.5), _logistic(0.5)
        share = (_logistic(progress - 0.5) - start) / (end - start)
    else:
        raise ValueError(f"unknown mix_rate schedule {schedule!r}")
    return peak * min(max(share, 0.0), 1.0)


def _logistic(x: float, steepness: float = 10.0) -> float:
    return 1.0 / (1.0 + math.exp(-steepness * x))

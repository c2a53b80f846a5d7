"""How learning rate and mix rate change over optimizer steps (Bengio et al. 2015 for the mix rate's shapes)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import Recipe


def mix_rate_at(step: int, total_steps: int, peak: float, schedule: str) -> float:
    """Mix rate of optimizer step `step` of 1..total_steps; never above `peak`.

    constant: the peak throughout. linear and cosine: from 0 at the first step to the peak at the last.
    inverse_sigmoid: a logistic from 0 to the peak, steepest in the middle.
    """
    if schedule == "constant":
        return peak
    progress = (step - 1) / (total_steps - 1) if total_steps > 1 else 1.0
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


def learning_rate_at(step: int, total_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of step `step` of 1..total_steps: linear warm-up, then the schedule down to 0 after the last.

    `warmup` below 1 is a share of all steps, else a number of steps.
    """
    warmup_steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown learning rate schedule {schedule!r}")


def check_length(
    path: Path, step: int, before: Recipe, recipe: Recipe, total_steps: int, say: Callable[[str], None]
) -> None:
    """Say what another length means for a run that goes on after `step`; refuse one that is shorter than that.

    Learning rate and mix rate are functions of the step and of the total: from here on they follow the new total.

    Args:
        path: the checkpoint that the run goes on from.
        before: the recipe by which it was trained so far.
        total_steps: steps of the run by its recipe now.

    Raises:
        UserError: more steps are trained already.
    """
    now, was = recipe.train, before.train
    if (now.max_steps, now.epochs) == (was.max_steps, was.epochs):
        return

    key = "train.max_steps" if now.max_steps else "train.epochs"
    what = f"{was.length} when {path} was written, {now.length} now"
    if total_steps < step:
        raise UserError(
            f"{key}: {what}: that is {total_steps} steps, and {step} are trained already; give as many or more, or go "
            "on from an earlier checkpoint in another output_dir: resume=CHECKPOINT output_dir=..."
        )
    text = f"{key}: {what}: going on after step {step} to step {total_steps}"
    if step < total_steps:
        rate = learning_rate_at(step + 1, total_steps, now.lr, now.schedule, now.warmup)
        text += f"; the learning rate ({now.schedule}) follows its schedule over {total_steps} steps: {rate:.3g} next"
        if recipe.method.uses_bss:
            text += f", and so does the mix rate ({recipe.method.bss.schedule}) from what is generated next"
    say(text)

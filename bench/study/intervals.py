"""Means over seeds, and intervals of differences that are paired: the same prompts, the same seeds."""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000


def mean_and_seeds(values_SN: np.ndarray) -> dict[str, object]:
    """Mean over everything, and each seed's mean. Rows are seeds, columns held-out prompts."""
    return {"mean": float(values_SN.mean()), "seeds": [float(value) for value in values_SN.mean(axis=1)]}


def paired_difference(ours_SN: np.ndarray, base_SN: np.ndarray, seed: int = 0) -> dict[str, object]:
    """Mean of `ours - base`, each seed's, and the 95 % bootstrap interval.

    Seeds and prompts are drawn with replacement, apart from each other: they are crossed, every seed meets every
    prompt. Few seeds say little about other seeds: the interval is too narrow by about sqrt(S / (S - 1)) in their part.
    """
    difference_SN = ours_SN.astype(float) - base_SN.astype(float)
    num_seeds, num_prompts = difference_SN.shape
    rng = np.random.default_rng(seed)
    seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=RESAMPLES)
    prompts_RN = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=RESAMPLES)
    means_R = ((seeds_RS @ difference_SN) * prompts_RN).sum(axis=1) / (num_seeds * num_prompts)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return {**mean_and_seeds(difference_SN), "low": float(low), "high": float(high)}


def correction_counts(before_SN: np.ndarray, after_SN: np.ndarray) -> dict[str, int]:
    """What a correction turn did to answers that were wrong and to those that were right, all seeds together."""
    return {
        "wrong_to_right": int(((before_SN == 0) & (after_SN == 1)).sum()),
        "right_to_wrong": int(((before_SN == 1) & (after_SN == 0)).sum()),
        "answers": int(before_SN.size),
    }

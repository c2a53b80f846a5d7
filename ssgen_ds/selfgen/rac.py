"""RAC, reference-answer-based correction: draft, cut, correction example, target (docs/method.md)."""

from __future__ import annotations

import torch

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import IGNORE, Sequence
from ssgen_ds.sampler.noise import uniform


def kept_length(num_tokens: int, cut: str, key: int) -> int:
    """How many draft tokens to keep: all, or uniform over 1..num_tokens."""
    if cut == "none" or num_tokens == 0:
        return num_tokens
    u = uniform(torch.tensor([key]), torch.tensor([0])).item()
    return 1 + int(u * num_tokens)


def correction_sequence(
    example: Example, draft_ids: list[int], cue_ids: list[int], target_ids: list[int], weight: float
) -> Sequence:
    """Prompt, draft as the model's own turn (its ids verbatim), cue, target; loss on the target only."""
    context_ids = example.prompt_ids + draft_ids + cue_ids
    return Sequence(context_ids + target_ids, [IGNORE] * len(context_ids) + target_ids, weight)


def accept_rewrite(rewrite_score: float, draft_score: float) -> bool:
    """A rewrite becomes the target when it is strictly closer to gold than the draft, or fully correct."""
    return rewrite_score > draft_score or rewrite_score >= 1.0

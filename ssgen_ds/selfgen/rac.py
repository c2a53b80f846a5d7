"""RAC, reference-answer-based correction: draft, cut, correction example, target (METHOD, RAC)."""

from __future__ import annotations

import torch

from ssgen_ds.data.tokenize import Example
from ssgen_ds.selfgen.noise import uniform
from ssgen_ds.selfgen.requests import Request, Sampled
from ssgen_ds.window import IGNORE, Sequence


def free_request(
    prompt_ids: list[int],
    max_tokens: int,
    key: int,
    stop_ids: frozenset[int],
    guess_ids: list[int] | None = None,
    corpora: tuple[list[int], ...] = (),
) -> Request:
    """Free decoding: every coin is 1, up to a stop id or `max_tokens`.

    Guesses only matter for speed: `guess_ids` position by position, `corpora` for look-ups, the most alike first; with
    them, the prompt and what is generated are looked up in, too.
    """
    guess = (guess_ids or [])[:max_tokens]
    padded = guess + [0] * (max_tokens - len(guess))
    return Request(prompt_ids, padded, [True] * max_tokens, key, stop_ids, len(guess), corpora)


def content_ids(sampled: Sampled) -> list[int]:
    """Tokens of a free sample without the stop id that ended it."""
    return sampled.tokens[:-1] if sampled.stopped else sampled.tokens


def stop_id(sampled: Sampled) -> int | None:
    """The stop id that ended a free sample; None: it ran out of tokens."""
    return sampled.tokens[-1] if sampled.stopped else None


def sampled_ids(content: list[int] | None, stop: int | None) -> list[int]:
    """A free sample as it was sampled, its stop id included; [] when there was none."""
    return [*(content or []), *([] if stop is None else [stop])]


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

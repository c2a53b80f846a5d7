"""BSS, batch-scheduled sampling: mixed contexts, gold labels (docs/method.md; the paper calls it BASH)."""

from __future__ import annotations

import torch

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import IGNORE, Sequence
from ssgen_ds.sampler.noise import uniform
from ssgen_ds.sampler.requests import Request


def draw_coins(num_tokens: int, mix_rate: float, key: int) -> list[bool]:
    """b_t = [u_t < mix_rate] for the response positions; the last is never context, so its coin is 0."""
    u_T = uniform(torch.full((num_tokens,), key), torch.arange(num_tokens))
    return [*(u_T[:-1] < mix_rate).tolist(), False]


def bss_request(example: Example, mix_rate: float, key: int, guess_ids: list[int] | None = None) -> Request:
    """The sampler's request for a mixed context. No stop ids: stops are banned in mid-context.

    The guess at the coins is gold, or `guess_ids` (an earlier mixed context of the example: gold where it had no coin).
    """
    gold_ids = example.response_ids
    coins = draw_coins(len(gold_ids), mix_rate, key)
    if guess_ids is None:
        return Request(example.prompt_ids, gold_ids, coins, key)
    at_coins = zip(coins, guess_ids, gold_ids, strict=True)
    return Request(example.prompt_ids, [guess if coin else gold for coin, guess, gold in at_coins], coins, key)


def context_sequence(example: Example, mixed_ids: list[int] | None) -> Sequence:
    """Read prompt and (mixed) response, predict gold. `mixed_ids` None is plain SFT."""
    context_ids = example.response_ids if mixed_ids is None else mixed_ids
    return Sequence(example.prompt_ids + context_ids, prompt_labels(example) + example.response_ids)


def prompt_labels(example: Example) -> list[int]:
    """Labels inside the prompt: earlier assistant turns with `loss_on: all`, else none."""
    if example.prompt_loss_mask is None:
        return [IGNORE] * len(example.prompt_ids)
    pairs = zip(example.prompt_ids, example.prompt_loss_mask, strict=True)
    return [token if counted else IGNORE for token, counted in pairs]

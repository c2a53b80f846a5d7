"""BSS, batch-scheduled sampling: mixed contexts, gold labels (METHOD, BSS; the paper calls it BASH)."""

from __future__ import annotations

import torch

from ssgen_ds.data.tokenize import Example
from ssgen_ds.selfgen.fixed_point import Request
from ssgen_ds.selfgen.noise import uniform
from ssgen_ds.window import IGNORE, Sequence


def draw_coins(num_tokens: int, mix_rate: float, key: int) -> list[bool]:
    """b_t = [u_t < mix_rate] for the response positions; the last is never context, so its coin is 0."""
    u_T = uniform(torch.full((num_tokens,), key), torch.arange(num_tokens))
    return [*(u_T[:-1] < mix_rate).tolist(), False]


def bss_request(example: Example, mix_rate: float, key: int) -> Request:
    """The sampler's request for a mixed context. Gold is the guess; no stop ids: stops are banned in mid-context."""
    coins = draw_coins(len(example.response_ids), mix_rate, key)
    return Request(example.prompt_ids, example.response_ids, coins, key)


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

"""Baseline (a): one model call for every response position with a KV cache, as every peer samples."""

from __future__ import annotations

import torch

from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.draw import TIE
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import CachedModel
from ssgen_ds.sampler.noise import gumbel
from ssgen_ds.sampler.requests import Request


@torch.no_grad()
def token_by_token(model: CachedModel, requests: list[Request], sampling: Sampling) -> tuple[list[list[int]], int, int]:
    """The mixed contexts of one batch, all of the same length T, sampled position by position.

    The prompts are one call, then T - 1 calls of one token a row follow. It is spared what it would not need: the
    projection and the noise are computed only where a coin asks for a token.

    Returns:
        tokens of each row, calls, and draws that rounding may have decided.
    """
    num_tokens = len(requests[0].coins)
    assert all(len(request.coins) == num_tokens for request in requests)
    contexts: list[list[int]] = [[] for _ in requests]
    model.open(len(requests), max(len(request.prompt_ids) for request in requests) + num_tokens)
    feeds = [request.prompt_ids for request in requests]
    ties = 0
    for t in range(num_tokens):
        drawing = [i for i, request in enumerate(requests) if request.coins[t]]
        ends = [len(request.prompt_ids) + t for request in requests]
        logits_NV = model(
            [
                Piece(i, end - len(tokens), tokens, [len(tokens) - 1] if i in drawing else [])
                for i, (tokens, end) in enumerate(zip(feeds, ends, strict=True))
            ]
        )
        drawn: dict[int, int] = {}
        if drawing:
            scores_NV = sampling.scores(logits_NV)
            if not sampling.greedy:
                keys_N = torch.tensor([requests[i].key for i in drawing], device=logits_NV.device)
                scores_NV = scores_NV + gumbel(keys_N, torch.full_like(keys_N, t), scores_NV.shape[-1])
            best = scores_NV.topk(2, dim=-1)
            ties += int((best.values[:, 0] - best.values[:, 1] < TIE).sum())
            drawn = dict(zip(drawing, best.indices[:, 0].tolist(), strict=True))
        for i, request in enumerate(requests):
            contexts[i].append(drawn.get(i, request.guess_ids[t]))
        feeds = [context[-1:] for context in contexts]
    return contexts, num_tokens, ties

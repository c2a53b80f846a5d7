"""Baseline (a): one model call for every response position with a KV cache, as every peer samples."""

from __future__ import annotations

import torch

from ssgen_ds.sampler.draw import TIE
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import CachedModel
from ssgen_ds.sampler.noise import gumbel
from ssgen_ds.sampler.requests import Request


@torch.no_grad()
def token_by_token(
    model: CachedModel, requests: list[Request], sampling: Sampling, device: torch.device
) -> tuple[list[list[int]], int, int]:
    """The mixed contexts of one batch, all of the same length T, sampled position by position.

    The prompts are one call, then T - 1 calls of one token a row follow. It is spared what it would not need: the
    projection and the noise are computed only where a coin asks for a token (one row always, a call must want some).

    Returns:
        tokens of each row, calls, and draws that rounding may have decided.
    """
    num_tokens = len(requests[0].coins)
    assert all(len(request.coins) == num_tokens for request in requests)
    contexts: list[list[int]] = [[] for _ in requests]
    model.open([len(request.prompt_ids) + num_tokens for request in requests])
    feeds = [request.prompt_ids for request in requests]
    ties = 0
    for t in range(num_tokens):
        drawing = [i for i, request in enumerate(requests) if request.coins[t]]
        logits_NV = _feed(model, feeds, [len(r.prompt_ids) + t for r in requests], drawing or [0], device)
        drawn: dict[int, int] = {}
        if drawing:
            scores_NV = sampling.scores(logits_NV)
            if not sampling.greedy:
                keys_N = torch.tensor([requests[i].key for i in drawing], device=device)
                scores_NV = scores_NV + gumbel(keys_N, torch.full_like(keys_N, t), scores_NV.shape[-1])
            best = scores_NV.topk(2, dim=-1)
            ties += int((best.values[:, 0] - best.values[:, 1] < TIE).sum())
            drawn = dict(zip(drawing, best.indices[:, 0].tolist(), strict=True))
        for i, request in enumerate(requests):
            contexts[i].append(drawn.get(i, request.guess_ids[t]))
        feeds = [context[-1:] for context in contexts]
    return contexts, num_tokens, ties


def _feed(
    model: CachedModel, feeds: list[list[int]], ends: list[int], wanted_rows: list[int], device: torch.device
) -> torch.Tensor:
    """Feed each row's tokens, which end before its absolute position `ends[i]`; logits [N, V] after the last."""
    width = max(map(len, feeds))
    tokens_BQ = torch.zeros(len(feeds), width, dtype=torch.long)
    positions_BQ = torch.full((len(feeds), width), -1, dtype=torch.long)
    wanted_BQ = torch.zeros(len(feeds), width, dtype=torch.bool)
    for i, (tokens, end) in enumerate(zip(feeds, ends, strict=True)):
        tokens_BQ[i, : len(tokens)] = torch.tensor(tokens)
        positions_BQ[i, : len(tokens)] = torch.arange(end - len(tokens), end)
        wanted_BQ[i, len(tokens) - 1] = i in wanted_rows
    return model(tokens_BQ.to(device), positions_BQ.to(device), wanted_BQ.to(device))

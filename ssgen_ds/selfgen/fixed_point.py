"""THE sampler: one exact loop for BSS contexts, RAC drafts, rewrites, evaluation and `ssgen generate`.

With coins and noise drawn up front the self-generated sequence is a deterministic function of itself,

    c_t = argmax(filter(logits(x, c_<t)) + g_t) where coin t is 1, and the guess where it is 0,

hence the fixed point of computing all positions in parallel from one forward pass. Iterating from any guess finds
exactly the sequence that sequential sampling finds: a pass makes at least the first position that changes final
(Song et al. 2020, arXiv 2002.03629; Wiggers & Hoogeboom 2020, arXiv 2002.09928). Which decoder it is, is a matter
of three parameters:

    coins     guess      block        what it is
    all 1     anything   1            autoregressive decoding with a KV cache
    some      gold       1            coin to coin: a run of gold tokens is one call
    some      gold       all          exact scheduled sampling in a few parallel passes
    all 1     a draft    W            speculative decoding: keeps the prefix that still holds

Pure torch: the model is any callable that satisfies `CachedModel`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.noise import gumbel

TIE = 1e-3  # below this gap between the two best scores, float32 rounding may decide: counted, METHOD "Exact"
_ROWS_AT_ONCE = 32  # noise and scores are [rows, V] float32: bounds their memory, and keeps them near the core


class CachedModel(Protocol):
    """A language model that remembers keys and values by absolute position."""

    def open(self, capacities: list[int]) -> None:
        """Start a batch; row i will hold at most `capacities[i]` tokens."""

    def __call__(self, tokens_BQ: torch.Tensor, positions_BQ: torch.Tensor, wanted_BQ: torch.Tensor) -> torch.Tensor:
        """Feed tokens at their absolute positions (-1: padding) and return logits [N, V] at the N wanted ones.

        What was remembered at and after a row's first fed position is replaced. Wanted is never all False.
        """

    def keep(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these, in this order."""


@dataclass
class Request:
    """One sequence to sample. Tokens are plain integers; `coins[t]` says whether position t is the model's."""

    prompt_ids: list[int]
    guess_ids: list[int]
    coins: list[bool]
    key: int  # noise.sequence_key
    stop_ids: frozenset[int] = frozenset()


@dataclass
class Sampled:
    """The fixed point of one request: its tokens (cut after a stop id) and what they cost."""

    tokens: list[int]
    passes: int = 0
    flips: int = 0  # coins whose token was changed by some pass, summed over passes
    ties: int = 0  # draws in which rounding may have decided
    stopped: bool = False


@dataclass
class SamplerStats:
    """Cost of a batch, or of several added up."""

    calls: int = 0
    token_forwards: int = 0
    sampled_tokens: int = 0
    response_tokens: int = 0
    flips: int = 0
    ties: int = 0

    def add(self, other: SamplerStats) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class _Row:
    """Progress of one request. Absolute position = len(prompt) + response position."""

    request: Request
    tokens: list[int]  # prompt, then the current guess
    coin_positions: list[int]  # response positions that the model decides
    next_coin: int = 0  # index into coin_positions: the first coin of the open block
    cached: int = 0  # leading tokens whose keys and values are remembered
    result: Sampled = field(default_factory=lambda: Sampled([]))

    @property
    def start(self) -> int:
        return len(self.request.prompt_ids)

    def block(self, width: int | None) -> list[int]:
        """Response positions of the coins of the open block; empty when the row is done."""
        end = None if width is None else self.next_coin + width
        return self.coin_positions[self.next_coin : end]


@torch.no_grad()
def sample_fixed_point(
    model: CachedModel, requests: list[Request], sampling: Sampling, block: int | None, device: torch.device | str
) -> tuple[list[Sampled], SamplerStats]:
    """Sample a batch of requests exactly.

    Args:
        model: remembers keys and values; its batch is opened and shrunk here.
        requests: any mixture of lengths; results come back in this order.
        sampling: filter settings shared by the batch.
        block: coins per block (W); None is the whole response at once.
        device: where tokens and noise live.

    Every pass feeds, for each row, the tokens from the first that is not remembered up to the one before the block's
    last coin, compares the draws with the guess, and makes everything up to the first change final.
    """
    stats = SamplerStats(response_tokens=sum(len(request.coins) for request in requests))
    rows = [_open_row(request) for request in requests]
    active = [row for row in rows if row.coin_positions]
    if active:
        model.open([len(row.tokens) for row in active])
        batch = list(active)
    while active:
        if len(active) <= len(batch) // 2:  # compaction copies the cache: only when it halves
            model.keep([position for position, row in enumerate(batch) if row in active])
            batch = list(active)
        _one_pass(model, batch, {id(row) for row in active}, sampling, block, device, stats)
        active = [row for row in active if row.block(block)]
    for row in rows:
        row.result.tokens = row.tokens[row.start :]
    return [row.result for row in rows], stats


def _open_row(request: Request) -> _Row:
    if not request.prompt_ids:
        raise ValueError("a request needs at least one prompt token: the first response token is predicted from it")
    if len(request.guess_ids) != len(request.coins):
        raise ValueError(f"guess has {len(request.guess_ids)} tokens, coins are {len(request.coins)}")
    coin_positions = [t for t, coin in enumerate(request.coins) if coin]
    return _Row(request, [*request.prompt_ids, *request.guess_ids], coin_positions)


def _one_pass(
    model: CachedModel,
    batch: list[_Row],
    active: set[int],
    sampling: Sampling,
    block: int | None,
    device: torch.device | str,
    stats: SamplerStats,
) -> None:
    """One parallel forward over the rows' open blocks, then each row advances to its first change."""
    feeds = [_feed(row, block) if id(row) in active else (0, 0, []) for row in batch]
    width = max(end - begin for begin, end, _ in feeds)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.full((len(batch), width), -1, dtype=torch.long)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, (row, (begin, end, coins)) in enumerate(zip(batch, feeds, strict=True)):
        tokens[i, : end - begin] = torch.tensor(row.tokens[begin:end], dtype=torch.long)
        positions[i, : end - begin] = torch.arange(begin, end)
        wanted[i, [row.start + t - 1 - begin for t in coins]] = True
    logits_NV = model(tokens.to(device), positions.to(device), wanted.to(device))
    keys = [row.request.key for row, (_, _, coins) in zip(batch, feeds, strict=True) for _ in coins]
    drawn, tied = _draw(logits_NV, keys, [t for _, _, coins in feeds for t in coins], sampling)
    stats.calls += 1
    stats.token_forwards += sum(end - begin for begin, end, _ in feeds)
    stats.sampled_tokens += len(drawn)
    offset = 0
    for row, (_, end, coins) in zip(batch, feeds, strict=True):
        if coins:
            span = slice(offset, offset + len(coins))
            _advance(row, coins, drawn[span], tied[span], end, stats)
            row.result.passes += 1
            offset += len(coins)


def _feed(row: _Row, block: int | None) -> tuple[int, int, list[int]]:
    """Absolute range to feed and the coins it predicts: position t is predicted from the token before it."""
    coins = row.block(block)
    return row.cached, row.start + coins[-1], coins


def _draw(
    logits_NV: torch.Tensor, keys: list[int], positions: list[int], sampling: Sampling
) -> tuple[list[int], list[bool]]:
    """The argmax of scores plus noise for each row of logits, and whether rounding may have decided it."""
    device = logits_NV.device
    keys_N = torch.tensor(keys, dtype=torch.long, device=device)
    positions_N = torch.tensor(positions, dtype=torch.long, device=device)
    drawn, tied = [], []
    for begin in range(0, len(keys), _ROWS_AT_ONCE):
        chunk = slice(begin, begin + _ROWS_AT_ONCE)
        scores_NV = sampling.scores(logits_NV[chunk])
        if not sampling.greedy:
            scores_NV = scores_NV + gumbel(keys_N[chunk], positions_N[chunk], scores_NV.shape[-1])
        best = scores_NV.topk(2, dim=-1)
        drawn.append(best.indices[:, 0])
        tied.append(best.values[:, 0] - best.values[:, 1] < TIE)
    return torch.cat(drawn).tolist(), torch.cat(tied).tolist()


def _advance(
    row: _Row, coins: list[int], drawn: list[int], tied: list[bool], fed_end: int, stats: SamplerStats
) -> None:
    """Write the draws into the guess; everything up to the first change is final, the rest is the next guess."""
    changed = [i for i, t in enumerate(coins) if row.tokens[row.start + t] != drawn[i]]
    for i in changed:
        row.tokens[row.start + coins[i]] = drawn[i]
    final = changed[0] + 1 if changed else len(coins)  # coins of this block that can no longer change
    # Keys and values stay right up to the first changed token, or up to the end of what was fed.
    row.cached = row.start + coins[changed[0]] if changed else fed_end
    row.next_coin += final
    row.result.flips += len(changed)
    stats.flips += len(changed)
    stats.ties += sum(tied[:final])
    row.result.ties += sum(tied[:final])
    for t, token in zip(coins[:final], drawn[:final], strict=True):
        if token in row.request.stop_ids:
            del row.tokens[row.start + t + 1 :]
            row.coin_positions = []
            row.result.stopped = True
            return

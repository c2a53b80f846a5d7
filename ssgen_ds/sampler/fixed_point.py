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

The guess never changes what is sampled, only what it costs. Pure torch: the model is any callable that satisfies
`CachedModel`; `block.py` runs the same loop on a model of costs alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from ssgen_ds.modeling.pieces import Piece, cut
from ssgen_ds.sampler.draw import Draw, Previous, draw_tokens
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.requests import CallLimit, OnDone, Request, Sampled, SamplerStats
from ssgen_ds.sampler.rows import BatchRow, Feed, open_row

_NO_LIMIT = CallLimit()


class CachedModel(Protocol):
    """A language model that remembers keys and values by absolute position."""

    def open(self, rows: int, capacity: int) -> None:
        """Start a batch of rows that hold at most `capacity` tokens. A row fed from position 0 on starts anew."""

    def __call__(self, pieces: list[Piece]) -> torch.Tensor:
        """Feed pieces of different rows and return logits [W, V] at the W wanted tokens, piece by piece.

        What was remembered at and after a row's first fed position is replaced. There may be no wanted ones.
        """

    def keep(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these, in this order."""


class Draws(Protocol):
    """Where the loop's draws come from: a model, or a model of its costs."""

    def open(self, rows: int, capacity: int) -> None: ...

    def keep(self, positions: list[int]) -> None: ...

    def __call__(self, feeds: list[Feed]) -> list[Draw]:
        """One draw for each coin of each feed, in order. A feed may have none; that of a row that is done is empty."""


@torch.no_grad()
def sample_fixed_point(
    model: CachedModel,
    requests: list[Request],
    sampling: Sampling,
    block: int | None,
    rows: int | None = None,
    on_done: OnDone = lambda done, total: None,
    limit: CallLimit = _NO_LIMIT,
) -> tuple[list[Sampled], SamplerStats]:
    """Sample requests exactly.

    Args:
        model: remembers keys and values; its batch is opened and shrunk here.
        requests: any mixture of lengths; results come back in this order.
        sampling: filter settings shared by the batch.
        block: coins per block (W); None is the whole response at once.
        rows: requests in work at a time; the place of one that is done goes to the next. None: all at once.
        on_done: called with the number of requests done and that of all, whenever more are done.
        limit: what one call of the model may take; a pass that takes more is made in several calls.
    """
    return iterate(_ModelDraws(model, sampling, limit), requests, block, rows, on_done)


def count_mismatches(
    model: CachedModel,
    requests: list[Request],
    results: list[Sampled],
    sampling: Sampling,
    limit: CallLimit = _NO_LIMIT,
) -> SamplerStats:
    """Draw every coin once more at the fixed point, in one pass: `verified` coins and `mismatches` among them.

    In exact arithmetic there are none; in bfloat16 the rounding of a wide call is not that of a narrow one.
    """
    again = [
        Request(request.prompt_ids, result.tokens, request.coins[: len(result.tokens)], request.key)
        for request, result in zip(requests, results, strict=True)
    ]
    rows = [row for row in map(open_row, again) if row.coin_positions]
    if not rows:
        return SamplerStats()
    draws = _ModelDraws(model, sampling, limit)
    draws.open(len(rows), max(len(row.tokens) for row in rows))
    feeds = [Feed(row, 0, row.start + row.coin_positions[-1], row.coin_positions) for row in rows]
    expected = [feed.row.tokens[feed.row.start + t] for feed in feeds for t in feed.coins]
    drawn = draws(feeds)
    wrong = sum(draw.token != token for draw, token in zip(drawn, expected, strict=True))
    return SamplerStats(verified=len(drawn), mismatches=wrong)


def iterate(
    draws: Draws,
    requests: list[Request],
    block: int | None,
    rows: int | None = None,
    on_done: OnDone = lambda done, total: None,
) -> tuple[list[Sampled], SamplerStats]:
    """The loop. Every pass feeds, for each row, the tokens from the first that is not remembered up to the one before
    the block's last coin, compares the draws with the guess, and makes everything up to the first change final."""
    stats = SamplerStats(response_tokens=sum(len(request.coins) for request in requests))
    everyone = [open_row(request, number) for number, request in enumerate(requests)]
    waiting = deque(row for row in everyone if not row.done)
    open_places = min(rows or len(waiting), len(waiting))
    if waiting:
        draws.open(open_places, max(len(row.tokens) for row in waiting))
    batch = [waiting.popleft() for _ in range(open_places)]
    done = len(requests) - len(waiting) - len(batch)
    while batch:
        feeds = [_feed(row, block) for row in batch]
        drawn = iter(draws(feeds))
        stats.calls += 1
        stats.token_forwards += sum(feed.end - feed.begin for feed in feeds)
        for feed in feeds:
            if feed.coins:
                _advance(feed, [next(drawn) for _ in feed.coins], block, stats)
            elif feed.end:
                feed.row.cached = feed.end
        ended = [i for i, feed in enumerate(feeds) if feed.end and batch[i].done]
        if ended:
            done += len(ended)
            on_done(done, len(requests))
        for i in ended:
            if waiting:
                batch[i] = waiting.popleft()
        active = [i for i, row in enumerate(batch) if not row.done]
        if len(active) <= len(batch) // 2:  # compaction copies the cache: only when it halves
            if active:
                draws.keep(active)
            batch = [batch[i] for i in active]
    for row in everyone:
        row.result.tokens = row.tokens[row.start :]
    return [row.result for row in everyone], stats


def _feed(row: BatchRow, block: int | None) -> Feed:
    """Position t is predicted from the token before it, so the block's last coin itself is not fed."""
    coins = row.block(block)
    if coins:
        return Feed(row, row.cached, row.start + coins[-1], coins)
    return Feed(row, row.cached, row.cached + row.rest, []) if row.rest else Feed(row, 0, 0, [])


def _advance(feed: Feed, drawn: list[Draw], block: int | None, stats: SamplerStats) -> None:
    """Write the draws into the guess; everything up to the first change is final, the rest is the next guess."""
    row, coins = feed.row, feed.coins
    changed = [i for i, t in enumerate(coins) if row.tokens[row.start + t] != drawn[i].token]
    final = changed[0] + 1 if changed else len(coins)  # coins of this block that can no longer change
    stop = next((i for i in range(final) if drawn[i].token in row.request.stop_ids), None)
    if stop is not None:
        final = stop + 1
    _count(row, coins, drawn, final, stats)
    for i in changed:
        row.tokens[row.start + coins[i]] = drawn[i].token
    # Keys and values stay right up to the first changed token, or up to the end of what was fed.
    row.cached = row.start + coins[changed[0]] if changed else feed.end
    row.next_coin += final
    first_open = coins[final - 1] + 1
    if stop is not None:
        del row.tokens[row.start + first_open :]
        row.coin_positions = []
        row.result.stopped = True
        return
    if row.lookup is not None:
        for draw in drawn[:final]:
            row.lookup.append(draw.token)
    row.guess_end = max(row.guess_end, first_open)
    if row.lookup is not None and (changed or row.guess_end == first_open) and block != 1:
        _look_up(row, first_open, block)


def _look_up(row: BatchRow, first_open: int, block: int | None) -> None:
    """Guess what follows the last final token from the texts that the sample may repeat."""
    assert row.lookup is not None
    room = len(row.request.coins) - first_open
    proposal = row.lookup.propose(room if block is None else min(room, block - 1))
    if proposal:
        row.tokens[row.start + first_open : row.start + first_open + len(proposal)] = proposal
        row.guess_end = first_open + len(proposal)
        row.previous.clear()  # these coins are guessed anew: their next draw is a first one


def _count(row: BatchRow, coins: list[int], drawn: list[Draw], final: int, stats: SamplerStats) -> None:
    """Passes, first draws against the guess, redraws against the last draw."""
    stats.row_passes += 1
    row.result.passes += 1
    stats.final_coins += final
    stats.draws += len(drawn)
    for t, draw in zip(coins, drawn, strict=True):
        last = row.previous.pop(t, None)
        if last is None and t < row.guess_end:
            stats.first_draws += 1
            stats.misses += row.tokens[row.start + t] != draw.token
        elif last is not None:
            stats.redraws += 1
            stats.moved += draw.moved
            stats.flips += last.token != draw.token
            row.result.flips += last.token != draw.token
    for t, draw in zip(coins[final:], drawn[final:], strict=True):
        row.previous[t] = Previous(draw.token, draw.log_prob)
    ties = sum(draw.tied for draw in drawn[:final])
    stats.ties += ties
    row.result.ties += ties


@dataclass
class _ModelDraws:
    """Draws from a model's logits."""

    model: CachedModel
    sampling: Sampling
    limit: CallLimit

    def open(self, rows: int, capacity: int) -> None:
        self.model.open(rows, capacity)

    def keep(self, positions: list[int]) -> None:
        self.model.keep(positions)

    def __call__(self, feeds: list[Feed]) -> list[Draw]:
        coins = iter([(feed.row, t, i > 0) for feed in feeds for i, t in enumerate(feed.coins)])
        draws: list[Draw] = []
        fed = [_piece(place, feed) for place, feed in enumerate(feeds) if feed.end]
        for pieces in cut(fed, self.limit.tokens, self.limit.logits):
            logits_NV = self.model(pieces)
            some = list(islice(coins, len(logits_NV)))
            draws += draw_tokens(
                logits_NV,
                [row.request.key for row, _, _ in some],
                [t for _, t, _ in some],
                self.sampling,
                tracked=[later for _, _, later in some],  # a block's first coin is always final
                previous=[row.previous.get(t) for row, t, _ in some],
            )
        return draws


def _piece(place: int, feed: Feed) -> Piece:
    """Position t is predicted from the token before it."""
    offset = feed.row.start - 1 - feed.begin
    return Piece(
        place, feed.begin, feed.row.tokens[feed.begin : feed.end], [offset + t for t in feed.coins], feed.row.number
    )

"""How far the sampler is with each request."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssgen_ds.sampler.draw import Previous
from ssgen_ds.sampler.lookup import Lookup
from ssgen_ds.sampler.requests import Request, Sampled


@dataclass
class BatchRow:
    """One request in work: a row of the batch. Absolute position = len(prompt) + response position."""

    request: Request
    tokens: list[int]  # prompt, then the current guess
    coin_positions: list[int]  # response positions that the model decides
    guess_end: int  # response positions before it hold gold tokens, final tokens or a guess worth trying
    lookup: Lookup | None
    next_coin: int = 0  # index into coin_positions: the first coin of the open block
    cached: int = 0  # leading tokens whose keys and values are remembered
    previous: dict[int, Previous] = field(default_factory=dict)  # last draws of coins that are not final
    result: Sampled = field(default_factory=lambda: Sampled([]))
    number: int = 0  # of the request

    @property
    def start(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def done(self) -> bool:
        """Whether every coin is final, and nothing is left to be fed."""
        return self.next_coin >= len(self.coin_positions) and not self.rest

    @property
    def rest(self) -> int:
        """Tokens that are still to be fed when every coin is final."""
        return max(0, len(self.tokens) - 1 - self.cached) if self.request.feeds_all else 0

    def block(self, width: int | None) -> list[int]:
        """Response positions of the coins of the open block; empty when the row is done.

        It ends at the first coin that has no guess: what follows that coin cannot be fed yet.
        """
        end = len(self.coin_positions) if width is None else self.next_coin + width
        coins = self.coin_positions[self.next_coin : end]
        if coins and coins[-1] >= self.guess_end:
            coins = [t for t in coins[:-1] if t < self.guess_end] + [next(t for t in coins if t >= self.guess_end)]
        return coins


@dataclass(frozen=True)
class Feed:
    """What one row feeds in a pass: absolute positions [begin, end), and the coins that they predict."""

    row: BatchRow
    begin: int
    end: int
    coins: list[int]


def open_row(request: Request, number: int = 0) -> BatchRow:
    """A row at its beginning. Raises ValueError for an empty prompt or a guess of another length than the coins."""
    if not request.prompt_ids:
        raise ValueError("a request needs at least one prompt token: the first response token is predicted from it")
    if len(request.guess_ids) != len(request.coins):
        raise ValueError(f"guess has {len(request.guess_ids)} tokens, coins are {len(request.coins)}")
    if request.corpora is not None and not all(request.coins):
        raise ValueError(
            "look-ups would overwrite gold tokens: corpora are for requests whose every coin is the model's"
        )
    coin_positions = [t for t, coin in enumerate(request.coins) if coin]
    guess_end = len(request.guess_ids) if request.guess_length is None else request.guess_length
    lookup = None if request.corpora is None else Lookup(request.corpora, request.prompt_ids)
    return BatchRow(
        request, [*request.prompt_ids, *request.guess_ids], coin_positions, guess_end, lookup, number=number
    )

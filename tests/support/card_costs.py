"""What calls of an 8B model cost on two GPUs, by their published rates: `block: auto` is tested on it without a GPU.

The rates that kernels reach are estimates: 55 % of the published peak for the matrix products, 250 and 70 TFLOP/s for
attention; 22 and 35 ms of the host for a call of 32 layers, without and with LoRA, as kernels were counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from ssgen_ds.modeling.pieces import Piece, groups_of
from ssgen_ds.sampler.draw import Draw
from ssgen_ds.sampler.rows import Feed

PARAMETERS, LAYERS, HEADS, KV_HEADS, SIZE, VOCABULARY, HIDDEN = 8.03e9, 32, 32, 8, 128, 128256, 4096


@dataclass(frozen=True)
class Card:
    """A GPU, and what a strategy adds to its calls."""

    bandwidth: float  # bytes/s
    products: float  # FLOP/s
    attention: float  # FLOP/s
    launch: float  # seconds that the host needs for a call
    gather: float = 0.0  # seconds of gathering the layers of a call

    def seconds(self, pieces: list[Piece], rows: int, draws: int) -> float:
        """Of a call in a batch of so many rows, and its draws."""
        tokens = sum(len(piece.tokens) for piece in pieces)
        weights = 2 * PARAMETERS
        products = max(2 * (PARAMETERS - VOCABULARY * HIDDEN) * tokens / self.products, weights / self.bandwidth)
        attention = 0.0
        for group in groups_of(pieces, rows, can_be_causal=True):
            batch = rows if group.rows is None else len(group.rows)
            keys = max(pieces[place].end for place in group.pieces)
            work = 4.0 * batch * HEADS * SIZE * group.width * keys
            memory = batch * KV_HEADS * SIZE * keys * 4
            if group.kind == "prompts":
                work, memory = work / 2, 0
            mask = (
                2 * batch * group.width * keys * (HEADS // KV_HEADS) if group.kind == "rows" and group.width > 1 else 0
            )
            copies = 2 * memory if group.kind == "rows" and group.rows is not None else 0
            attention += LAYERS * max(work / self.attention, (memory + mask + copies) / self.bandwidth)
        head = draws * VOCABULARY * (2 * HIDDEN / self.products + 42 / self.bandwidth)
        host = draws * 25e-6 + len(pieces) * 20e-6
        return max(products + attention + head, self.launch) + host + self.gather


H100 = Card(3.35e12, 989e12 * 0.55, 250e12, 0.022)
H100_SHARDED = Card(3.35e12, 989e12 * 0.55, 250e12, 0.045, gather=0.05)
RTX_4090_LORA = Card(1.0e12, 165e12 * 0.55, 70e12, 0.035)


@dataclass
class CardDraws:
    """The sampler's `Draws` on a card: random misses and flips, and the seconds that the calls take."""

    card: Card
    miss_rate: float
    flip_rate: float
    rows: int = 0
    seconds: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def open(self, rows: int, capacity: int) -> None:
        self.rows = rows

    def keep(self, positions: list[int]) -> None:
        self.rows = len(positions)

    def __call__(self, feeds: list[Feed]) -> list[Draw]:
        draws = []
        for feed in feeds:
            for t in feed.coins:
                token = feed.row.tokens[feed.row.start + t]
                rate = self.flip_rate if t in feed.row.previous else self.miss_rate
                draws.append(Draw(token ^ 1 if self.rng.random() < rate else token))
        pieces = [Piece(i, one.begin, range(one.end - one.begin), ()) for i, one in enumerate(feeds) if one.coins]
        self.seconds += self.card.seconds(pieces, self.rows, len(draws))
        return draws


class CardModel:
    """A `CachedModel` that computes nothing: its calls move a clock on."""

    def __init__(self, card: Card) -> None:
        self.card, self.now, self.rows = card, 0.0, 0

    def clock(self) -> float:
        return self.now

    def open(self, rows: int, capacity: int) -> None:
        self.rows = rows

    def __call__(self, pieces: list[Piece]) -> torch.Tensor:
        draws = sum(len(piece.wanted) for piece in pieces)
        self.now += self.card.seconds(pieces, self.rows, 0)
        return torch.zeros(draws, 0)

    def draw(self, logits_NV: torch.Tensor, *_: object) -> None:
        """Takes the time of the head and of the draws, in the place of `draw_tokens`."""
        count = len(logits_NV)
        self.now += self.card.seconds([], self.rows, count) - self.card.seconds([], self.rows, 0)

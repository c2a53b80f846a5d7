"""A language model small enough to reason about: logits are a fixed pseudo-random function of the whole prefix."""

from __future__ import annotations

import hashlib

import torch

from ssgen_ds.modeling.pieces import Piece


class ToyModel:
    """Implements `CachedModel`: remembers tokens by position instead of keys and values, and counts its calls."""

    def __init__(self, vocab_size: int = 7, sharpness: float = 2.0):
        self.vocab_size, self.sharpness = vocab_size, sharpness
        self.calls = 0
        self.token_forwards = 0

    def open(self, rows: int, capacity: int) -> None:
        self.memory = [[-1] * capacity for _ in range(rows)]

    def keep(self, rows: list[int]) -> None:
        self.memory = [self.memory[row] for row in rows]

    def __call__(self, pieces: list[Piece]) -> torch.Tensor:
        rows = [piece.row for piece in pieces]
        assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(self.memory)))
        self.calls += 1
        self.token_forwards += sum(len(piece.tokens) for piece in pieces)
        logits = [torch.zeros(0, self.vocab_size)]
        for piece in pieces:
            memory = self.memory[piece.row]
            memory[piece.begin : piece.end] = piece.tokens
            for place in piece.wanted:
                prefix = memory[: piece.begin + place + 1]
                assert -1 not in prefix, "reads a position that was never fed"
                logits.append(self.logits(prefix)[None])
        return torch.cat(logits)

    def logits(self, prefix: list[int]) -> torch.Tensor:
        """[V], a function of every token of the prefix."""
        digest = hashlib.blake2b(str(prefix).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return self.sharpness * torch.randn(self.vocab_size, generator=generator)

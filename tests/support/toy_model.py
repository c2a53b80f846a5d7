"""A language model small enough to reason about: logits are a fixed pseudo-random function of the whole prefix."""

from __future__ import annotations

import hashlib

import torch


class ToyModel:
    """Implements `CachedModel`: remembers tokens by position instead of keys and values, and counts its calls."""

    def __init__(self, vocab_size: int = 7, sharpness: float = 2.0):
        self.vocab_size, self.sharpness = vocab_size, sharpness
        self.calls = 0
        self.token_forwards = 0

    def open(self, capacities: list[int]) -> None:
        self.memory = [[-1] * capacity for capacity in capacities]

    def keep(self, rows: list[int]) -> None:
        self.memory = [self.memory[row] for row in rows]

    def __call__(self, tokens_BQ: torch.Tensor, positions_BQ: torch.Tensor, wanted_BQ: torch.Tensor) -> torch.Tensor:
        assert len(tokens_BQ) == len(self.memory)
        assert wanted_BQ.any()
        self.calls += 1
        self.token_forwards += int((positions_BQ >= 0).sum())
        logits = []
        for row, memory in enumerate(self.memory):
            for token, position, wanted in zip(
                tokens_BQ[row].tolist(), positions_BQ[row].tolist(), wanted_BQ[row].tolist(), strict=True
            ):
                if position < 0:
                    continue
                memory[position] = token
                if wanted:
                    prefix = memory[: position + 1]
                    assert -1 not in prefix, "reads a position that was never fed"
                    logits.append(self.logits(prefix))
        return torch.stack(logits)

    def logits(self, prefix: list[int]) -> torch.Tensor:
        """[V], a function of every token of the prefix."""
        digest = hashlib.blake2b(str(prefix).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return self.sharpness * torch.randn(self.vocab_size, generator=generator)

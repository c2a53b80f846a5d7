"""Counter-based randomness: every draw is a pure function of its key, never of a global generator.

A key names one decision: (seed, stream, example id, visit, response position, token). Hashing it gives the same
uniform on every device, whatever the rank, the batch, the number of ranks or the point of resume. Noise over the
vocabulary is Gumbel(0, 1), so that `argmax(logits / temperature + noise)` is a draw from the softmax.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import torch

_MASK32 = 0xFFFFFFFF
_COIN = _MASK32  # no vocabulary has this many tokens: the "token" of a position's own uniform


class Stream(IntEnum):
    """Independent sources of randomness; the numbers are part of the key and must never change."""

    BSS = 1
    DRAFT = 2
    REWRITE = 3
    CUT = 4
    EVALUATION = 5


def sequence_key(seed: int, stream: Stream, example_id: str, visit: int) -> int:
    """64-bit key of one sampled sequence. With `noise: common` pass visit 0 at every visit."""
    digest = hashlib.blake2b(f"{seed}\x1f{int(stream)}\x1f{visit}\x1f{example_id}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def uniform(keys_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """One float64 uniform in (0, 1) for each (sequence key, response position); both int64, any shape."""
    return _to_unit(_hash(keys_N, positions_N, torch.full_like(positions_N, _COIN))).double()


def gumbel(keys_N: torch.Tensor, positions_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel(0, 1) noise [N, V] in float32 for N (sequence key, response position) pairs."""
    tokens_V = torch.arange(vocab_size, device=keys_N.device)
    u_NV = _to_unit(_hash(keys_N[:, None], positions_N[:, None], tokens_V[None, :])).float()
    # -log E with E = -log(1 - u) exponential. Written through log1p because float32 resolves u near 0, where the
    # large values come from: -log(-log u) would cap at 15.9.
    return -torch.log(-torch.log1p(-u_NV))


def _to_unit(bits: torch.Tensor) -> torch.Tensor:
    """32-bit integers -> float64 in (0, 1), never 0 and, after rounding to float32, never 1."""
    return ((bits.double() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def _hash(keys: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hash broadcastable int64 tensors to 32 bits. Products wrap in int64; only their low 32 bits are kept."""
    low = _mix((keys & _MASK32) ^ _mix(positions * 0x9E3779B1 & _MASK32))
    high = _mix((((keys >> 32) & _MASK32) + low) & _MASK32)
    return _mix(_mix((tokens * 0x9E3779B1 + low) & _MASK32) ^ high)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser with low bias (constants: Wellons' hash prospector, lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)

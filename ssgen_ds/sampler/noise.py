"""Counter-based randomness: every draw is a pure function of its key, never of a global generator.

A key names one decision: (seed, stream, example id, visit, response position, token). Hashing it gives the same
uniform on every device, whatever the rank, the batch, the number of ranks or the point of resume. Noise over the
vocabulary is Gumbel(0, 1), so that `argmax(logits / temperature + noise)` is a draw from the softmax.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from functools import lru_cache

import torch

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: spreads small integers
_FACTOR_1, _FACTOR_2 = 0x7FEB352D, 0x846CA68B


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
    """One float64 uniform in (0, 1) for each (sequence key, response position); both int64 [N]."""
    low_N, high_N = _position_words(keys_N, positions_N)
    return (_mix(_mix(low_N) ^ high_N).double() + 0.5) * 2.0**-32


def gumbel(keys_N: torch.Tensor, positions_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel(0, 1) noise [N, V] in float32 for N (sequence key, response position) pairs."""
    low_N, high_N = _position_words(keys_N, positions_N)
    bits_NV = _token_words(vocab_size, keys_N.device) + _as_int32(low_N)[:, None]
    bits_NV = _mix_int32_(bits_NV.bitwise_xor_(_as_int32(high_N)[:, None]))
    # -log E with E = -log(1 - u) exponential: float32 resolves u near 0, where the large values come from;
    # -log(-log u) would cap at 15.9. Below, v = -u with u = (k + 1/2) / 2^31, never 0 and never 1.
    v_NV = bits_NV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).clamp_(min=-(1 - 2.0**-24))
    return v_NV.log1p_().neg_().log_().neg_()


def _position_words(keys_N: torch.Tensor, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit words (in int64) for each (key, position); every bit of either depends on every bit of both."""
    low_N = _mix((keys_N & _MASK32) ^ _mix(positions_N * _GOLDEN & _MASK32))
    high_N = _mix((((keys_N >> 32) & _MASK32) + low_N) & _MASK32)
    return _mix(low_N ^ high_N), high_N


@lru_cache(maxsize=8)
def _token_words(vocab_size: int, device: torch.device) -> torch.Tensor:
    """One well-mixed 32-bit word for each token id, as int32 [V]."""
    return _as_int32(_mix((torch.arange(vocab_size, device=device) + 1) * _GOLDEN & _MASK32))


def _as_int32(x: torch.Tensor) -> torch.Tensor:
    """32-bit words held in int64 -> the same bits as int32."""
    return torch.where(x >= 2**31, x - 2**32, x).int()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser with low bias on words in int64 (constants: Wellons' hash prospector, lowbias32).

    Products wrap in int64; only their low 32 bits are kept.
    """
    x = ((x ^ (x >> 16)) * _FACTOR_1) & _MASK32
    x = ((x ^ (x >> 15)) * _FACTOR_2) & _MASK32
    return x ^ (x >> 16)


def _mix_int32_(x: torch.Tensor) -> torch.Tensor:
    """`_mix` in place on int32, half the memory traffic: shifts are made logical by a mask, products wrap."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_FACTOR_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_FACTOR_2 - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))

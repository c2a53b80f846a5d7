"""One draw at each of many positions: filtered scores plus Gumbel noise, argmax, and what it says about the noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite

import torch

from ssgen_ds.errors import NonFiniteError
from ssgen_ds.modeling.call_layout import on_device
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.noise import gumbel

TIE = 1e-3  # below this gap between the two best scores, float32 rounding may decide: counted, see docs/method.md
# Noise and scores are [rows, V] in float32, about four of them at a time. A CPU keeps few rows near its cores; an
# accelerator starts about a hundred kernels a chunk, and wants many rows for them.
_ROWS_AT_ONCE = 32
_SCORES_AT_ONCE = 2**25  # 128 MiB


def draws_at_once(vocab_size: int, is_cpu: bool) -> int:
    """Rows of scores in memory at a time."""
    return _ROWS_AT_ONCE if is_cpu else max(_ROWS_AT_ONCE, _SCORES_AT_ONCE // vocab_size)


@dataclass(frozen=True)
class Draw:
    """The token drawn at one coin, and how the distribution moved since the coin was last drawn."""

    token: int
    tied: bool = False  # rounding may have decided
    log_prob: float = 0.0  # of the token, under the filtered distribution; 0 where `tracked` was False
    # (1 - q(v) / p(v))+ for the token v drawn last time from p, q being the distribution now: its mean over draws is
    # the total variation distance between p and q. 0 where nothing was drawn before.
    moved: float = 0.0


@dataclass(frozen=True)
class Previous:
    """The last draw of a coin that is not final yet."""

    token: int
    log_prob: float


def draw_tokens(
    logits_NV: torch.Tensor,
    keys: list[int],
    positions: list[int],
    sampling: Sampling,
    tracked: list[bool],
    previous: list[Previous | None],
) -> list[Draw]:
    """N draws, one for each row of logits; key and response position name the noise.

    Args:
        tracked: where the token's log probability is wanted: a later pass may draw there again.
        previous: the last draw there, if any.

    Raises NonFiniteError where the best score is NaN or infinite.

    The distributions' comparison costs a log-sum-exp over V, so it is made only where one of the two is asked for.
    """
    if not keys:
        return []
    device = logits_NV.device
    old = [-1 if item is None else item.token for item in previous]
    keys_N, positions_N, old_N = on_device([keys, positions, old], device)
    step = draws_at_once(logits_NV.shape[-1], device.type == "cpu")
    compare = not sampling.greedy and (any(tracked) or any(item is not None for item in previous))
    columns: list[torch.Tensor] = []
    for begin in range(0, len(keys), step):
        chunk = slice(begin, begin + step)
        scores_NV = sampling.scores(logits_NV[chunk])
        noisy_NV = scores_NV
        if not sampling.greedy:
            noisy_NV = scores_NV + gumbel(keys_N[chunk], positions_N[chunk], scores_NV.shape[-1])
        best = noisy_NV.topk(2, dim=-1)
        token_N1, gap_N = best.indices[:, :1], best.values[:, 0] - best.values[:, 1]
        log_N2 = torch.zeros(len(token_N1), 2, device=device)
        if compare:
            both_N2 = torch.cat([token_N1, old_N[chunk, None].clamp(min=0)], dim=1)
            log_N2 = scores_NV.gather(1, both_N2) - scores_NV.logsumexp(dim=-1, keepdim=True)
        best_N1 = best.values[:, :1]
        columns.append(torch.cat([x.double() for x in (token_N1, best_N1, gap_N[:, None], log_N2)], dim=1))
    draws = []
    rows = zip(torch.cat(columns).tolist(), previous, positions, strict=True)
    for (token, score, gap, new_log, old_log), item, position in rows:
        if not isfinite(score):  # NaN sorts first, so it shows here; -inf: no token has a probability
            raise NonFiniteError(f"the logits at response position {position} are not finite")
        moved = 0.0 if item is None or sampling.greedy else max(0.0, 1.0 - _ratio(old_log, item.log_prob))
        draws.append(Draw(int(token), gap < TIE, new_log, moved))
    return draws


def _ratio(log_q: float, log_p: float) -> float:
    """q / p for p > 0; capped, since only values below 1 matter."""
    return exp(min(0.0, log_q - log_p))

"""From logits to scores: ban list, temperature, top-k, top-p, in this order (Hugging Face's)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch


class HasSampling(Protocol):
    """What a user sets: `SamplingSettings` of a command, or a section of the recipe."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """`temperature` 0 is greedy: no noise; `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingSettings):
    """How one token is drawn: as a user sets it, and never one of the banned ids."""

    banned_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: HasSampling, banned_ids: Iterable[int]) -> Sampling:
        """As the settings say, without the banned ids."""
        return cls(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            banned_ids=tuple(banned_ids),
        )

    def scores(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Float32 scores [N, V]; adding Gumbel noise and taking the argmax samples from the filtered softmax."""
        scores_NV = logits_NV.float()
        if self.banned_ids:
            scores_NV = scores_NV.index_fill(-1, _ids_on(scores_NV.device, self.banned_ids), -torch.inf)
        if self.temperature == 0:
            return scores_NV
        scores_NV = scores_NV / self.temperature
        if 0 < self.top_k < scores_NV.shape[-1]:
            kth_N1 = scores_NV.topk(self.top_k, dim=-1).values[:, -1:]
            scores_NV = scores_NV.masked_fill(scores_NV < kth_N1, -torch.inf)
        if self.top_p < 1:
            scores_NV = _keep_nucleus(scores_NV, self.top_p)
        return scores_NV

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@lru_cache(maxsize=16)
def _ids_on(device: torch.device, ids: tuple[int, ...]) -> torch.Tensor:
    """Copied once: a copy at every draw would make the host wait."""
    return torch.tensor(ids, device=device)


def _keep_nucleus(scores_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p`; at least one."""
    sorted_NV, order_NV = scores_NV.sort(dim=-1, descending=True, stable=True)
    probs_NV = sorted_NV.softmax(dim=-1)
    reached_before_NV = probs_NV.cumsum(dim=-1) - probs_NV >= top_p
    reached_before_NV[:, 0] = False
    return scores_NV.masked_fill(reached_before_NV.scatter(-1, order_NV, reached_before_NV), -torch.inf)

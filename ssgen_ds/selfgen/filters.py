"""From logits to scores: ban list, temperature, top-k, top-p, in this order (Hugging Face's)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn. `temperature` 0 is greedy: no noise; `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned_ids: tuple[int, ...] = ()

    def scores(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Float32 scores [N, V]; adding Gumbel noise and taking the argmax samples from the filtered softmax."""
        scores_NV = logits_NV.float()
        if self.banned_ids:
            banned = torch.tensor(self.banned_ids, device=scores_NV.device)
            scores_NV = scores_NV.index_fill(-1, banned, -torch.inf)
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


def _keep_nucleus(scores_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p`; at least one."""
    sorted_NV, order_NV = scores_NV.sort(dim=-1, descending=True, stable=True)
    probs_NV = sorted_NV.softmax(dim=-1)
    reached_before_NV = probs_NV.cumsum(dim=-1) - probs_NV >= top_p
    reached_before_NV[:, 0] = False
    return scores_NV.masked_fill(reached_before_NV.scatter(-1, order_NV, reached_before_NV), -torch.inf)

"""An engine without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class PlainEngine:
    """What the step asks of DeepSpeed, on a plain model without ZeRO in float32."""

    module: torch.nn.Module
    lr: float = 0.0
    boundaries: list[bool] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self):
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=self.lr)

    def __call__(self, **inputs):
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.boundaries.append(is_last)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas, "the one division by the global weight covers the accumulation steps"
        loss.backward()

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def zero_optimization(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False

    def get_global_grad_norm(self) -> None:
        return None

    def was_step_applied(self) -> bool:
        return True

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    @property
    def training(self) -> bool:
        return self.module.training

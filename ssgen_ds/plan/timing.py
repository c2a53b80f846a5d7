"""How long a step and a round take: counted operations over a rate that was measured, or a card's published one.

operations of a step = 6 N tokens                 full: forward 2 N, backward 4 N (N: parameters without embedding)
                     = (4 N + 6 N_lora) tokens    LoRA: no gradient of the frozen weights
                     + 2 N tokens again           gradient checkpointing: a second forward
+ attention          12 layers hidden T a token (causal; full), 8 for LoRA

a model call while generating takes the longer of reading the weights once and its operations:
calls of mixed contexts  min(coins, 3 + 40 mix_rate)   measured at T = 128, see bench/results/selfgen-smollm2.json
calls of drafts          method.rac.max_draft_tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssgen_ds.plan.sizes import Sizes

# Dense bfloat16 operations a second and bytes of memory a second, as published.
CARDS = {
    "H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12), "L40S": (362e12, 0.86e12),
    "4090": (165e12, 1.0e12), "3090": (71e12, 0.94e12), "A10": (125e12, 0.6e12), "T4": (65e12, 0.3e12),
}  # fmt: skip
_SHARE = 0.4  # share of the published rate that training reaches; peers publish at most 46 % on an H100


@dataclass(frozen=True)
class Rate:
    """Operations and bytes a second of one device, and where they come from."""

    flops: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Work:
    """One optimizer step and one round, over all ranks."""

    tokens: float  # tokens read in a step
    length: float  # tokens of a sequence
    response: float  # tokens of a response
    sequences: int  # sequences in a step
    mix_rate: float  # 0: no mixed contexts
    draft: int  # longest draft; 0: none
    steps_per_round: int
    rows: int  # generated together on a rank
    ranks: int
    checkpointing: bool
    element: int


def measured_rate(device: torch.device, dtype: torch.dtype) -> Rate:
    """A product of matrices and a copy, each timed once warm; about a second."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)

    def seconds(run: Callable[[], object], repeats: int = 5) -> float:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    flops = 2 * size**3 / seconds(lambda: a @ a)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    bandwidth = 2 * block.numel() / seconds(block.clone)
    return Rate(flops * 0.7, bandwidth, "measured here (a product of matrices, of which training reaches 70 %)")


def published_rate(name: str) -> Rate | None:
    """The published rates of a card, by its name; None for an unknown card."""
    for card, (flops, bandwidth) in CARDS.items():
        if card.lower() in name.lower().replace(" ", ""):
            return Rate(flops * _SHARE, bandwidth, f"{card} as published, of which training is taken to reach 40 %")
    return None


def operations_per_token(sizes: Sizes, length: float, checkpointing: bool) -> float:
    """Operations of forward and backward, without embedding look-ups."""
    dense = sizes.parameters - sizes.vocabulary * sizes.hidden  # a tied head is taken for the embedding: labels are few
    attention = sizes.layers * sizes.hidden * length
    full, lora = 6.0 * dense + 12.0 * attention, 4.0 * dense + 6.0 * sizes.adapter + 8.0 * attention
    count = lora if sizes.adapter else full
    return count + (2.0 * dense + 4.0 * attention if checkpointing else 0.0)


def seconds(sizes: Sizes, work: Work, rate: Rate) -> dict[str, float]:
    """`step` and `round`: training alone, and a round's generation; communication is not counted."""
    per_token = operations_per_token(sizes, work.length, work.checkpointing)
    step = work.tokens * per_token / rate.flops / work.ranks
    reading = sizes.parameters * work.element / rate.bandwidth
    batches = -(-work.sequences * work.steps_per_round // (work.rows * work.ranks))
    forward = 2.0 * (sizes.parameters - sizes.vocabulary * sizes.hidden) / rate.flops
    prompt = work.rows * work.length * forward
    calls, fed = 0.0, 0.0
    if work.mix_rate > 0:
        calls += min(max(1.0, work.mix_rate * work.response), 3.0 + 40.0 * work.mix_rate)
        fed += work.response
    if work.draft:
        calls += work.draft
        fed += work.draft
    generation = batches * (prompt + max(calls * reading, work.rows * fed * forward)) if calls else 0.0
    return {"step": step, "round": generation}

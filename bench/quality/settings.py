"""The runs of the study, and how much of everything: sized to some hours on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 24  # optimizer steps of 8 examples
# Steps of SFT runs that had at least as much time as BSS, as RAC, and as both in one.
LONGER = {"sft_long": 32, "sft_longer": 75, "sft_longest": 88}
REFRESH_EVERY = 8  # steps of one round of self-generation
TEST_EXAMPLES = 100
TEST_SHARE = 0.2  # of the rows, by a hash of their id
MAX_PROMPT_TOKENS = 96  # of the article with its instruction and the turn markers
MAX_NEW_TOKENS = 48
SEEDS = (0, 1)


@dataclass(frozen=True)
class Run:
    """One way to train. `corrected`: evaluated after one correction turn, too."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    corrected: bool = False
    steps: int = STEPS


RUNS = (
    Run("sft", "SFT", ("method.name=sft",)),
    Run("bss10", "BSS, mix rate .1", ("method.name=bss", "method.bss.mix_rate=0.1")),
    Run("bss25", "BSS, mix rate .25", ("method.name=bss", "method.bss.mix_rate=0.25")),
    Run("rac", "RAC", ("method.name=rac",), corrected=True),
    Run("bss_rac", "BSS .1 + RAC", ("method.name=bss+rac", "method.bss.mix_rate=0.1"), corrected=True),
    *(Run(name, f"SFT, {steps} steps", ("method.name=sft",), steps=steps) for name, steps in LONGER.items()),
)

"""What is generated for one example at one optimizer step. Parts that come into being together are one type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssgen_ds.data.tokenize import Example
from ssgen_ds.sampler.free import FreeSample


@dataclass(frozen=True)
class Slot:
    """One example at the optimizer step that trains on it."""

    step: int
    example: Example
    visit: int
    mix_rate: float


@dataclass(frozen=True)
class Mixed:
    """A mixed context: gold where the coin is False, the model's own token where it is True."""

    coins: list[bool]
    ids: list[int]
    passes: int  # of the sampler, until nothing changed


@dataclass(frozen=True)
class Draft(FreeSample):
    """The model's own answer, and how many of its tokens the cut keeps."""

    kept: int

    @property
    def kept_ids(self) -> list[int]:
        return self.ids[: self.kept]


@dataclass(frozen=True)
class Target:
    """What a correction is trained to say: the gold answer, or the model's rewrite of it."""

    ids: list[int]
    kind: Literal["reference", "rewrite"]


@dataclass
class Generated:
    """What was generated for one slot. None: the method does not generate it, or there was nothing to generate."""

    step: int
    example_id: str
    visit: int
    mix_rate: float
    gold_ids: list[int]
    mixed: Mixed | None = None
    draft: Draft | None = None
    rewrite: FreeSample | None = None
    target: Target | None = None  # None: the example has no correction

    @property
    def context_ids(self) -> list[int]:
        """The response as the model reads it: mixed, or gold."""
        return self.gold_ids if self.mixed is None else self.mixed.ids

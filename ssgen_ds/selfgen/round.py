"""One round: the slots of the next optimizer steps, what was generated for them, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass

from ssgen_ds.selfgen.generated import Generated, Slot
from ssgen_ds.selfgen.rounds import RoundStats


def round_of(step: int, refresh_every: int) -> int:
    """The number of the round that a step belongs to; both count from 1."""
    return (step - 1) // refresh_every + 1


@dataclass(frozen=True)
class Round:
    """Rounds are numbered from 1. One slot has one record; both are found by the step that trains on them.

    `opened_at` is the step before which this process opened the round: the first, or the one that a resume begins at.
    """

    number: int
    slots: dict[int, list[Slot]]
    records: dict[int, list[Generated]]
    opened_at: int
    stats: RoundStats  # nothing, where the round was read back

    @classmethod
    def of(cls, number: int, slots: list[Slot], records: list[Generated], opened_at: int, stats: RoundStats) -> Round:
        """From slots and records in the same order, which is that of the steps."""
        by_step: tuple[dict[int, list[Slot]], dict[int, list[Generated]]] = ({}, {})
        for slot, record in zip(slots, records, strict=True):
            by_step[0].setdefault(slot.step, []).append(slot)
            by_step[1].setdefault(slot.step, []).append(record)
        return cls(number, *by_step, opened_at, stats)

    def cost_at(self, step: int) -> RoundStats:
        """What the round cost, for the row of the step that it was opened before; nothing for the other rows."""
        return self.stats if step == self.opened_at else RoundStats()

    @property
    def passes(self) -> float:
        """Of the sampler over a mixed context, on average; 0 where there is none."""
        contexts = [record.mixed for group in self.records.values() for record in group if record.mixed]
        passes = [mixed.passes for mixed in contexts if mixed.passes]  # one without a coin needs none
        return sum(passes) / len(passes) if passes else 0.0

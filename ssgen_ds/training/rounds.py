"""The rounds of a run: opened when a step needs one, kept on disk, read back after a resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ssgen_ds.data.read_ahead import DataPlan
from ssgen_ds.distributed.world import World
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.layout import round_path
from ssgen_ds.run.progress import Progress
from ssgen_ds.sampler.requests import OnDoneOf
from ssgen_ds.selfgen.generated import Generated, Slot
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.round import Round, round_of
from ssgen_ds.selfgen.round_file import read_round, write_round
from ssgen_ds.selfgen.rounds import RoundGenerator, RoundStats
from ssgen_ds.selfgen.samples import describe_records
from ssgen_ds.training.saver import Saver
from ssgen_ds.training.schedules import mix_rate_at


@dataclass
class Rounds:
    """Finds the round of a step. All ranks ask for the same steps in rising order.

    Args:
        resumed: the checkpoint's copy of the round in progress; None: the run begins, or generates nothing.
    """

    recipe: Recipe
    world: World
    plan: DataPlan
    generator: RoundGenerator
    history: History
    saver: Saver
    progress: Progress
    total_steps: int
    resumed: Path | None = None
    _open: Round | None = field(default=None, init=False)

    def at(self, step: int) -> Round:
        """The round that `step` belongs to. Raises GenerationInterrupted when one rank was asked to stop."""
        if self._open is None or step not in self._open.slots:
            with self.world.phase("generate", step):
                self._open = self._opened(step)
        return self._open

    def slots_of(self, step: int) -> list[Slot]:
        """The examples that a step trains on, with its mix rate."""
        bss = self.recipe.method.bss
        rate = mix_rate_at(step, self.total_steps, bss.mix_rate, bss.schedule) if self.recipe.method.uses_bss else 0.0
        return [Slot(step, item.example, item.visit, rate) for item in self.plan.batch(step)]

    def _opened(self, step: int) -> Round:
        """Generated, or read back after a resume.

        A round that ended early, because the run was to be shorter then, gets the records that it lacks.
        """
        every = self.recipe.selfgen.refresh_every
        number = round_of(step, every)
        first = (number - 1) * every + 1
        steps = range(first, min(first + every, self.total_steps + 1))
        slots = [slot for one in steps for slot in self.slots_of(one)]
        stats, records = RoundStats(), self._read_back(steps) if step > first else []
        rest = slots[len(records) :]
        if rest:
            earlier = self._earlier(number, rest)
            generated, stats = self.generator.generate(rest, self._display(number), earlier)
            records = records + generated
        if self.recipe.method.name != "sft":
            self.saver.write(f"round {number}", "round-file", step, lambda: self._keep(number, slots, records))
        return Round.of(number, slots, records, step, stats)

    def _read_back(self, steps: range) -> list[Generated]:
        """The records of these steps in the checkpoint's copy."""
        resumed = self.resumed
        if resumed is None:
            return []
        return [record for record in self.world.together(lambda: read_round(resumed)) if record.step in steps]

    def _earlier(self, number: int, slots: list[Slot]) -> dict[str, Generated]:
        """The previous visits of the examples of a round, where they help."""
        if not self.generator.uses_earlier:
            return {}
        return self.history.before(number, [slot.example.id for slot in slots])

    def _display(self, number: int) -> OnDoneOf:
        return lambda phase: lambda done, total: self.progress.generating(number, done, total, phase)

    def _keep(self, number: int, slots: list[Slot], records: list[Generated]) -> None:
        run_dir = Path(self.recipe.output_dir)
        write_round(round_path(run_dir, number), records)
        describe_records(run_dir, number, slots, records, self.generator.chat)

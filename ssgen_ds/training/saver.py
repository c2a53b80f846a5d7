"""The checkpoints of a run, and what a user is told when one of its files cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssgen_ds.checkpoint.save import Saved, TrainState, save_checkpoint
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.layout import round_path


@dataclass
class Saver:
    """Saves on all ranks together.

    Args:
        step: the newest step that need not be saved: 0, or that of the checkpoint which the run goes on from.
        spared: rank 0: the step whose checkpoint stays whatever its age.
    """

    engine: Any
    recipe: Recipe
    world: World
    step: int
    spared: Callable[[], int | None]
    cost: Saved | None = field(default=None, init=False)  # of the last checkpoint of this process

    def save(self, state: TrainState) -> None:
        """A complete checkpoint of this state; none when its step is saved already."""
        if state.step == self.step:
            return
        run_dir = Path(self.recipe.output_dir)
        with self.world.phase("save", state.step):
            self.cost = save_checkpoint(
                self.engine,
                run_dir,
                state,
                round_path(run_dir, state.round) if self.recipe.method.name != "sft" else None,
                keep=self.recipe.checkpoint.keep,
                world=self.world,
                spared=self.spared(),
            )
        self.step = state.step

    def row(self, step: int) -> dict[str, float]:
        """What the checkpoint that was written after the step before cost."""
        if self.cost is None or self.step != step - 1:
            return {}
        return {"checkpoint_seconds": self.cost.seconds, "checkpoint_bytes": self.cost.nbytes}

    def write(self, what: str, phase: str, step: int, work: Callable[[], object]) -> None:
        """Rank 0 writes; where it cannot, all ranks are refused together and told where a new start goes on."""

        def write() -> None:
            with self.world.phases.enter(phase, step):
                work()

        try:
            self.world.together(lambda: write() if self.world.is_main else None)
        except UserError as error:
            next_start = f"goes on after step {self.step}" if self.step else "begins again"
            raise UserError(f"{what} was not written; mend that and start again, which {next_start}\n{error}") from None

"""Cadence only: round, step, evaluate, log, save, stop. What each of them does is elsewhere."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from ssgen_ds.checkpoint.save import TrainState
from ssgen_ds.data.read_ahead import DataPlan
from ssgen_ds.data.window import Packing, Window, build_window
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import GenerationInterrupted, NonFiniteError, StopRequested
from ssgen_ds.evaluate.while_training import TrainingEvaluation
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.logbook import Logbook
from ssgen_ds.run.progress import Progress
from ssgen_ds.selfgen.generated import Slot
from ssgen_ds.selfgen.log_row import generated_row, round_row
from ssgen_ds.selfgen.round import Round
from ssgen_ds.selfgen.rounds import RoundGenerator
from ssgen_ds.training.one_forward import OneForward
from ssgen_ds.training.rounds import Rounds
from ssgen_ds.training.saver import Saver
from ssgen_ds.training.schedules import learning_rate_at
from ssgen_ds.training.step import StepStats, train_step


@dataclass
class Trainer:
    """Everything a run needs, built by `build.py`; `fit` runs it to the end or to a requested stop."""

    recipe: Recipe
    world: World
    engine: Any
    plan: DataPlan
    generator: RoundGenerator
    rounds: Rounds
    evaluation: TrainingEvaluation
    saver: Saver
    state: TrainState
    total_steps: int
    logbook: Logbook | None  # rank 0 only
    progress: Progress
    packing: Packing
    one_forward: OneForward | None = None

    def fit(self) -> None:
        """Train from `state.step` to `total_steps`. Raises StopRequested after a checkpoint when asked to stop."""
        try:
            self.evaluation.take_up(self.state.step)
            for step in range(self.state.step + 1, self.total_steps + 1):
                round = self.rounds.at(step)
                row = self._train(step, round)
                row |= self.evaluation.loss_row(step)
                self._log(row)
                is_best = self.evaluation.answer_after(step, row.get("eval_loss"))
                if is_best or self._is_checkpoint_due(step):
                    self.saver.save(self.state)
                if is_best:
                    self.evaluation.best.publish()
                if self.world.any(self.world.stop.is_set) and step < self.total_steps:
                    self._stop()
        except GenerationInterrupted:  # a round or an evaluation was begun: it is made again after a resume
            self._stop()

    def _is_checkpoint_due(self, step: int) -> bool:
        every = self.recipe.checkpoint.every
        return step == self.total_steps or (every is not None and step % every == 0)

    def _stop(self) -> NoReturn:
        """Leave with a complete checkpoint of the steps done."""
        step = self.state.step
        self.saver.save(self.state)
        what = f"at step {step}; the checkpoint is complete" if step else "before the first step was done"
        raise StopRequested(f"stopped on request {what}: start again to go on")

    # -- a step --------------------------------------------------------------------------------------------------------

    def _train(self, step: int, round: Round) -> dict[str, Any]:
        """One optimizer step, and its row for the log."""
        train = self.recipe.train
        slots, records = round.slots[step], round.records[step]
        started = time.perf_counter()
        pairs = zip(slots, records, strict=True)
        sequences = [sequence for slot, record in pairs for sequence in self.generator.sequences(slot, record)]
        window = build_window(sequences, self.packing, self.world.rank, self.world.size, self.world.device)
        lr = learning_rate_at(step, self.total_steps, train.lr, train.schedule, train.warmup)
        torch.manual_seed(step_seed(train.seed, step, self.world.rank))
        with self.world.phase("train", step):
            replays = None if self.one_forward is None else self.one_forward.replays(window)
            stats = train_step(self.engine, window, lr, self.world, replays)
        if self.one_forward is not None:
            self.one_forward.forget()
        seconds = time.perf_counter() - started
        self.state = replace(self.state, step=step, round=round.number)
        self._count_skipped(stats, slots)
        row = self._row(stats, window, lr, seconds)
        return row | generated_row(self.recipe.method, records) | round_row(round, step)

    def _count_skipped(self, stats: StepStats, slots: list[Slot]) -> None:
        """Updates that were left out are reported and counted, over restarts too; too many in a row end the run."""
        if stats.is_applied:
            self.state = replace(self.state, skipped_in_row=0)
            return
        in_row, limit = self.state.skipped_in_row + 1, self.recipe.train.max_skipped_steps
        self.state = replace(self.state, skipped=self.state.skipped + 1, skipped_in_row=in_row)
        what = "the loss" if not math.isfinite(stats.loss) else "the gradient"
        ids = ", ".join(slot.example.id for slot in slots[:8]) + (" ..." if len(slots) > 8 else "")
        text = f"step {self.state.step}: {what} is not finite, the update was left out ({in_row} in a row)"
        if in_row > limit:
            raise NonFiniteError(f"{text}; train.max_skipped_steps is {limit}. Examples of this step: {ids}")
        self.progress.message(f"{text}. Examples: {ids}")

    # -- its row -------------------------------------------------------------------------------------------------------

    def _row(self, stats: StepStats, window: Window, lr: float, seconds: float) -> dict[str, Any]:
        """What is known of the step that was just made, except what it was trained on."""
        step = self.state.step
        return {
            "step": step,
            "round": self.state.round,
            "epoch": self.plan.epoch(step),
            "loss": stats.loss,
            "lr": lr,
            "grad_norm": stats.grad_norm,
            "skipped_steps": self.state.skipped,
            "num_tokens": window.num_tokens,
            "step_seconds": seconds,
            "tokens_per_second": window.num_tokens / seconds,
            **self._memory_row(),
            **self.saver.row(step),
        }

    def _memory_row(self) -> dict[str, int]:
        """Peaks of the rank that needed most: so far, and of this step by what was done (0: not done)."""
        memory = self.world.memory
        peaks = {f"peak_{name}_bytes": peak for name, peak in memory.take().items()}
        peaks = {"peak_memory_bytes": memory.highest, **peaks}
        return {key: int(self.world.max(peak)) for key, peak in peaks.items()}

    def _log(self, row: dict[str, Any]) -> None:
        def write() -> None:
            if self.logbook is not None:
                self.logbook.log(row)

        self.saver.write(f"metrics.jsonl of step {row['step']}", "metrics", row["step"], write)
        self.progress.step(row)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout in one optimizer step on one rank: no generator state to save, and none to restore."""
    # The number that is hashed counts from 0, as in the first release: a run begun then resumes bitwise.
    return int.from_bytes(hashlib.blake2b(f"{seed} {step - 1} {rank}".encode(), digest_size=7).digest(), "little")

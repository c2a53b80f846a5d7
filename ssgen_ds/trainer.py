"""Cadence only: round, step, log, evaluate, save, stop. What each of them does is elsewhere."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ssgen_ds.checkpoint import Saved, TrainState, save_checkpoint
from ssgen_ds.config import Recipe
from ssgen_ds.data.ahead import ReadAhead
from ssgen_ds.distributed import World
from ssgen_ds.errors import GenerationInterrupted, NonFiniteError, StopRequested
from ssgen_ds.evaluate.during import TrainingEvaluation
from ssgen_ds.logbook import Logbook
from ssgen_ds.progress import Progress
from ssgen_ds.selfgen.engine_sampler import inference_mode
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.log_row import generated_row, round_row
from ssgen_ds.selfgen.rounds import Generated, RoundGenerator, RoundStats, Slot
from ssgen_ds.selfgen.samples import describe_records
from ssgen_ds.selfgen.schedule import mix_rate_at
from ssgen_ds.selfgen.store import read_round, round_path, write_round
from ssgen_ds.step import StepStats, evaluation_loss, learning_rate_at, train_step
from ssgen_ds.window import Packing, Sequence, Window, build_window


@dataclass
class Trainer:
    """Everything a run needs, built by `build.py`; `fit` runs it to the end or to a requested stop."""

    recipe: Recipe
    world: World
    engine: Any
    plan: ReadAhead
    eval_sequences: list[Sequence]
    evaluation: TrainingEvaluation
    generator: RoundGenerator
    history: History
    state: TrainState
    total_steps: int
    logbook: Logbook | None  # rank 0 only
    progress: Progress
    packing: Packing
    resumed_round: Path | None = None  # the checkpoint's copy of the round in progress
    saved_step: int = field(init=False)  # the newest step that need not be saved
    saved: Saved | None = field(default=None, init=False)  # the last checkpoint of this process

    def __post_init__(self) -> None:
        self.saved_step = self.state.step

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def fit(self) -> None:
        """Train from `state.step` to `total_steps`. Raises StopRequested after a checkpoint when asked to stop."""
        slots: dict[int, list[Slot]] = {}
        records: dict[int, list[Generated]] = {}
        round_stats = RoundStats()
        self._take_up_evaluation()
        for step in range(self.state.step, self.total_steps):
            if step not in slots:
                try:
                    with self.world.phase("generate", step + 1):
                        slots, records, round_stats = self._open_round(step)
                except GenerationInterrupted:
                    self._stop()
            started = time.perf_counter()
            sequences = [
                sequence
                for slot, record in zip(slots[step], records[step], strict=True)
                for sequence in self.generator.sequences(slot, record)
            ]
            window = self._window(sequences)
            lr = self._learning_rate(step)
            torch.manual_seed(step_seed(self.recipe.train.seed, step, self.world.rank))
            with self.world.phase("train", step + 1):
                stats = train_step(self.engine, window, lr, self.world)
            seconds = time.perf_counter() - started
            self.state = replace(self.state, step=step + 1, round=self._round(step))
            self._count_skipped(stats, slots[step])
            row = self._row(step, stats, window, lr, seconds)
            row |= generated_row(self.recipe.method, slots[step], records[step])
            row |= round_row(round_stats if step == min(slots) else RoundStats(), records)
            with self.world.phase("evaluate", step + 1):
                row |= self._evaluate(step)
            self._log(row)
            is_best = self._evaluate_answers(row.get("eval_loss"))
            self._save_and_stop(step, is_best)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _round(self, step: int) -> int:
        """1-based round of a 0-based step."""
        return step // self.recipe.selfgen.refresh_every + 1

    def _open_round(self, step: int) -> tuple[dict[int, list[Slot]], dict[int, list[Generated]], RoundStats]:
        """Slots and records of the round that `step` belongs to, by step; generated, or read back after a resume."""
        every = self.recipe.selfgen.refresh_every
        first = (self._round(step) - 1) * every
        slots = {s: self._slots(s) for s in range(first, min(first + every, self.total_steps))}
        flat = [slot for group in slots.values() for slot in group]
        stats = RoundStats()
        if step > first and self.resumed_round is not None:
            flat_records = self.world.together(lambda: read_round(self.resumed_round))
        else:
            flat_records, stats = self.generator.generate(flat, self._generating(step), self._earlier(step, flat))
        if self.world.is_main and self.recipe.method.name != "sft":
            write_round(round_path(self.run_dir, self._round(step)), flat_records)
            describe_records(self.run_dir, self._round(step), flat, flat_records, self.generator.chat)
        by_step: dict[int, list[Generated]] = {s: [] for s in slots}
        for record in flat_records:
            by_step[record.step].append(record)
        return slots, by_step, stats

    def _earlier(self, step: int, slots: list[Slot]) -> dict[str, Generated]:
        """The previous visits of the examples of a round, where they help."""
        if not self.generator.uses_earlier:
            return {}
        return self.history.before(self._round(step), [slot.example.id for slot in slots])

    def _generating(self, step: int) -> Any:
        number = self._round(step)
        return lambda phase, done, total: self.progress.generating(number, done, total, phase)

    def _slots(self, step: int) -> list[Slot]:
        bss = self.recipe.method.bss
        rate = mix_rate_at(step, self.total_steps, bss.mix_rate, bss.schedule) if self.recipe.method.uses_bss else 0.0
        return [Slot(step, item.example, item.visit, rate) for item in self.plan.batch(step)]

    # -- a step --------------------------------------------------------------------------------------------------------

    def _window(self, sequences: list[Sequence]) -> Window:
        return build_window(sequences, self.packing, self.world.rank, self.world.size, self.world.device)

    def _learning_rate(self, step: int) -> float:
        train = self.recipe.train
        return learning_rate_at(step, self.total_steps, train.lr, train.schedule, train.warmup)

    def _count_skipped(self, stats: StepStats, slots: list[Slot]) -> None:
        """Updates that were left out are said and counted, over restarts too; too many in a row end the run."""
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
        text += f". Examples: {ids}"
        self.progress.message(text)

    def _evaluate(self, step: int) -> dict[str, float]:
        every, done = self.recipe.eval.every, step + 1
        due = done == self.total_steps or (every is not None and done % every == 0)
        if not (self.eval_sequences and due):
            return {}
        started = time.perf_counter()
        return self.evaluate() | {"eval_seconds": time.perf_counter() - started}

    def evaluate(self) -> dict[str, float]:
        """Mean NLL of the gold responses of the evaluation examples, in nats per token."""
        window = self._window(self.eval_sequences)
        with inference_mode(self.engine.module):
            loss = evaluation_loss(self.engine, window, self.world)
        return {"eval_loss": loss, "eval_num_tokens": window.num_labels}

    def _take_up_evaluation(self) -> None:
        """After a resume: forget evaluations of steps to come, and make one that a stop has cut short."""
        self.evaluation.forget_after(self.state.step)
        if self._evaluate_answers(None):
            self.evaluation.publish_best()

    def _evaluate_answers(self, loss: float | None) -> bool:
        """Answer the evaluation examples where that is due; whether this step is the best so far.

        `loss`: of their gold responses, where it is known already.
        """
        step = self.state.step
        if not self.evaluation.is_due(step, self.total_steps):
            return False

        def tick(phase: str) -> Any:
            return lambda done, total: self.progress.generating(self._round(step - 1), done, total, phase)

        with self.world.phase("evaluate", step):
            try:
                loss = self.evaluate()["eval_loss"] if loss is None else loss
                result = self.evaluation.make(step, loss, tick)
            except GenerationInterrupted:
                self._stop()
        is_best = self.evaluation.is_best(step)
        scores = {name: score["mean"] for name, score in result["scores"].items()}
        if self.logbook is not None:
            self.logbook.note(step, {f"eval_{key}": value for key, value in {**scores, **result["behaviour"]}.items()})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.progress.message(f"step {step}  {shown}{'  (best so far)' * is_best}")
        return is_best

    # -- logging, saving, stopping -------------------------------------------------------------------------------------

    def _row(self, step: int, stats: StepStats, window: Window, lr: float, seconds: float) -> dict[str, Any]:
        """Of one step, but for what it was trained on."""
        return {
            "step": step + 1,
            "round": self._round(step),
            "epoch": self.plan.epoch(step),
            "loss": stats.loss,
            "lr": lr,
            "grad_norm": stats.grad_norm,
            "skipped_steps": self.state.skipped,
            "num_tokens": window.num_tokens,
            "step_seconds": seconds,
            "tokens_per_second": window.num_tokens / seconds,
            **self._memory_row(),
            **self._checkpoint_row(step),
        }

    def _memory_row(self) -> dict[str, int]:
        """Peaks of the rank that needed most: so far, and of this step by what was done (0: not done)."""
        memory = self.world.memory
        peaks = {f"peak_{name}_bytes": peak for name, peak in memory.take().items()}
        peaks = {"peak_memory_bytes": memory.highest, **peaks}
        return {key: int(self.world.max(peak)) for key, peak in peaks.items()}

    def _checkpoint_row(self, step: int) -> dict[str, float]:
        """What the checkpoint that was written after the step before cost."""
        if self.saved is None or self.saved_step != step:
            return {}
        return {"checkpoint_seconds": self.saved.seconds, "checkpoint_bytes": self.saved.nbytes}

    def _log(self, row: dict[str, Any]) -> None:
        if self.logbook is not None:
            self.logbook.log(row)
        self.progress.step(row)

    def _save_and_stop(self, step: int, is_best: bool) -> None:
        every, done = self.recipe.checkpoint.every, step + 1
        if done == self.total_steps or (every is not None and done % every == 0) or is_best:
            with self.world.phase("save", done):
                self.save()
        if is_best:
            self.evaluation.publish_best()
        if self.world.any(self.world.stop.is_set) and done < self.total_steps:
            self._stop()

    def _stop(self) -> NoReturn:
        """Leave with a complete checkpoint of the steps done; a round that was begun is generated again."""
        step = self.state.step
        if self.saved_step != step:
            with self.world.phase("save", step):
                self.save()
        what = f"at step {step}; the checkpoint is complete" if step else "before the first step was done"
        raise StopRequested(f"stopped on request {what}: start again to go on")

    def save(self) -> None:
        """A complete checkpoint of the current state."""
        in_memory = round_path(self.run_dir, self.state.round)
        self.saved = save_checkpoint(
            self.engine,
            self.run_dir,
            self.state,
            in_memory if self.recipe.method.name != "sft" else None,
            keep=self.recipe.checkpoint.keep,
            world=self.world,
        )
        self.saved_step = self.state.step


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout in one optimizer step on one rank: no generator state to save, and none to restore."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little")

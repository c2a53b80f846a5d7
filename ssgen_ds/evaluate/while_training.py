"""Answers to the evaluation examples while training: `evaluations/step-00000100.json`.

An evaluation is a function of the weights, the examples and the recipe: its file says that it is done. One that a stop
has cut short is made after the resume, before the next step.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.distributed.world import World
from ssgen_ds.evaluate.best import BestSoFar
from ssgen_ds.evaluate.gold_loss import GoldLoss
from ssgen_ds.evaluate.summary import predictions_of, summarize
from ssgen_ds.inference.answers import Answer, AnswerSettings, answer
from ssgen_ds.metrics.scorer import Scorer
from ssgen_ds.recipe.schema import EvalConfig, Recipe
from ssgen_ds.run.files import write_json, write_lines
from ssgen_ds.run.layout import evaluation_file, evaluations_by_step, predictions_file
from ssgen_ds.run.logbook import Logbook
from ssgen_ds.run.progress import Progress
from ssgen_ds.sampler.block import BlockChooser
from ssgen_ds.sampler.requests import OnDoneOf
from ssgen_ds.selfgen.round import round_of


@dataclass
class TrainingEvaluation:
    """What a run evaluates, and when. All ranks call it together.

    Args:
        gold: measures the loss on the gold responses of the examples.
        total_steps: of the run; after the last one everything is evaluated.
        logbook: takes the scores; rank 0 only.
    """

    recipe: Recipe
    chat: ChatFormat
    blocks: BlockChooser
    examples: Sequence[Example]
    gold: GoldLoss
    total_steps: int
    progress: Progress
    logbook: Logbook | None
    best: BestSoFar = field(init=False)

    def __post_init__(self) -> None:
        self.best = BestSoFar(self.run_dir, self.world, self.settings.best, self._is_alike)

    @property
    def world(self) -> World:
        return self.blocks.sampler.world

    @property
    def settings(self) -> EvalConfig:
        return self.recipe.eval

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def how(self) -> AnswerSettings:
        settings = self.settings
        return AnswerSettings(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=self.recipe.train.seed,
            correct=settings.correct,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex over the examples: `data.eval` may change when a run goes on, and its numbers with it."""
        rows = [[one.id, one.prompt_ids, one.response_ids] for one in self.examples]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()

    def take_up(self, step: int) -> None:
        """After a resume at `step`: forget the evaluations of later steps, and make one that a stop has cut short."""
        self.forget_after(step)
        self.answer_after(step, None)
        self.best.publish()  # a kill may have come between the checkpoint and this

    def forget_after(self, step: int) -> None:
        """Delete the evaluations of steps that a resume has undone."""

        def forget() -> None:
            for number, file in evaluations_by_step(self.run_dir).items():
                if number > step:
                    predictions_file(file).unlink(missing_ok=True)
                    file.unlink()

        self.world.together(lambda: forget() if self.world.is_main else None)

    def loss_row(self, step: int) -> dict[str, float]:
        """Columns of metrics.jsonl: the loss on the gold responses, on the rows of the steps where it is due."""
        if not (self.gold.sequences and self._is_time(step)):
            return {}
        with self.world.phase("evaluate", step):
            started = time.perf_counter()
            return self.gold.measure() | {"eval_seconds": time.perf_counter() - started}

    def answer_after(self, step: int, loss: float | None) -> bool:
        """Answer the examples where that is due after a step, and say whether this step is the best so far.

        `loss`: on their gold responses, where it is known already. Raises GenerationInterrupted on all ranks when one
        was asked to stop.
        """
        if not self.is_due(step):
            return False
        number = round_of(step, self.recipe.selfgen.refresh_every)
        with self.world.phase("evaluate", step):
            loss = self.gold.measure()["eval_loss"] if loss is None else loss
            result = self.make(
                step, loss, lambda phase: lambda done, total: self.progress.generating(number, done, total, phase)
            )
        is_best = self.best.is_at(step)
        scores = {name: score["mean"] for name, score in result["scores"].items()}
        if self.logbook is not None:
            numbers = {**scores, **result["behaviour"]}
            self.logbook.note(step, {f"eval_{key}": value for key, value in numbers.items()})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.progress.message(f"step {step}  {shown}{'  (best so far)' * is_best}")
        return is_best

    def _is_time(self, step: int) -> bool:
        every = self.settings.every
        return step == self.total_steps or (every is not None and step % every == 0)

    def is_due(self, step: int) -> bool:
        """Whether the evaluation after `step` is still to be made."""
        if not len(self.examples) or not (self.settings.metrics or self.settings.best) or step == 0:
            return False
        return self._is_time(step) and not self.world.broadcast(evaluation_file(self.run_dir, step).is_file())

    def make(self, step: int, loss: float | None, on_done_of: OnDoneOf) -> dict[str, Any]:
        """Answer, score and write; returns what was written, on every rank. `loss`: on the gold responses.

        Raises GenerationInterrupted on all ranks when one was asked to stop: nothing is written then.
        """
        started = time.perf_counter()
        examples = list(self.examples)
        cue = self.recipe.method.rac.correction_cue
        answers = answer(self.how, self.blocks, self.chat, examples, cue, on_done_of) if self.settings.metrics else []
        return self.world.on_main(lambda: self._write(step, loss, examples, answers, started))

    def _write(
        self, step: int, loss: float | None, examples: list[Example], answers: list[Answer], started: float
    ) -> dict[str, Any]:
        scorer = Scorer(self.settings.metrics, "eval.metrics")
        rows = [
            row
            for number, given in enumerate(answers)
            for row in predictions_of(
                number, examples[number], (examples[number].gold_text,), [given], self.chat, scorer
            )
        ]
        file = evaluation_file(self.run_dir, step)
        result: dict[str, Any] = {
            "kind": "evaluation",
            "model": str(self.run_dir),
            "data": "the run's evaluation examples",
            "step": step,
            "num_examples": len(examples),
            "loss": loss,
            "examples": self.fingerprint,
            "settings": asdict(self.how),
            **(summarize(rows, scorer.names) if rows else {"scores": {}, "behaviour": {}, "correction": None}),
            "predictions": predictions_file(file).name,
            "seconds": time.perf_counter() - started,
        }
        file.parent.mkdir(exist_ok=True)
        write_lines(file.with_name(result["predictions"]), rows)
        known = self.best.known()
        write_json(file, result)  # last: it says that the evaluation is done
        self.best.add(step, result, known)
        return result

    def _is_alike(self, result: dict[str, Any]) -> bool:
        """Whether its numbers can be compared with those to come. Older files do not say what their examples were."""
        if "examples" in result and result["examples"] != self.fingerprint:
            return False
        return self.settings.best == "loss" or result["settings"] == asdict(self.how)

"""Answers to the evaluation examples while training: `evaluations/step-00000100.json`, and which step is best.

An evaluation is a function of the weights, the examples and the recipe: its file says that it is done. One that a stop
has cut short is made after the resume, before the next step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.checkpoint import BEST
from ssgen_ds.config import EvalConfig, Recipe
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.evaluate.answers import AnswerSettings, Tick, answer
from ssgen_ds.evaluate.journal import write_json
from ssgen_ds.evaluate.run import predictions_of
from ssgen_ds.evaluate.scorers import Scorer
from ssgen_ds.evaluate.summary import summarize
from ssgen_ds.generate import write_lines
from ssgen_ds.selfgen.engine_sampler import EngineSampler

_PREFIX = "step-"


@dataclass(frozen=True)
class BestStep:
    """The evaluated step whose `metric` is best, the earliest of equals."""

    step: int
    metric: str
    value: float


@dataclass
class TrainingEvaluation:
    """What a run evaluates, and where it keeps it. All ranks call it together."""

    recipe: Recipe
    chat: ChatFormat
    vocab_size: int
    examples: Sequence[Example]
    sampler: EngineSampler

    @property
    def settings(self) -> EvalConfig:
        return self.recipe.eval

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the evaluation after (1-based) `step` is still to be made."""
        every, world = self.settings.every, self.sampler.world
        if not len(self.examples) or not (self.settings.metrics or self.settings.best) or step == 0:
            return False
        if step != total_steps and (every is None or step % every):
            return False
        return not world.broadcast(evaluation_file(self.run_dir, step).is_file())

    def forget_after(self, step: int) -> None:
        """Of steps that a resume has undone."""
        if self.sampler.world.is_main:
            for number, file in _evaluations(self.run_dir).items():
                if number > step:
                    file.with_name(f"{file.stem}.predictions.jsonl").unlink(missing_ok=True)
                    file.unlink()

    def make(self, step: int, loss: float | None, tick: Tick) -> dict[str, Any]:
        """Answer, score and write; returns what was written, on every rank. `loss`: of the gold responses.

        Raises GenerationInterrupted on all ranks when one was asked to stop: nothing is written then.
        """
        world, settings, started = self.sampler.world, self.settings, time.perf_counter()
        how = AnswerSettings(
            settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p, self.recipe.train.seed,
            settings.correct,
        )  # fmt: skip
        examples = list(self.examples)
        cue = self.recipe.method.rac.correction_cue
        answers = answer(how, self.sampler, self.chat, examples, cue, self.vocab_size, tick) if settings.metrics else []

        def write() -> dict[str, Any]:
            scorer = Scorer(settings.metrics, "eval.metrics")
            rows = [
                row
                for number, given in enumerate(answers)
                for row in predictions_of(
                    number, examples[number], (examples[number].reference,), [given], self.chat, scorer
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
                "settings": asdict(how),
                **(summarize(rows, scorer.names) if rows else {"scores": {}, "behaviour": {}, "correction": None}),
                "predictions": f"{file.stem}.predictions.jsonl",
                "seconds": time.perf_counter() - started,
            }
            file.parent.mkdir(exist_ok=True)
            write_lines(file.with_name(result["predictions"]), rows)
            write_json(file, result)  # last: it says that the evaluation is done
            return result

        return world.broadcast(world.together(lambda: write() if world.is_main else {}))

    def is_best(self, step: int) -> bool:
        """Whether the evaluation of this step is the best so far; the same on every rank."""
        metric, world = self.settings.best, self.sampler.world
        best = find_best(self.run_dir, metric) if world.is_main and metric is not None else None
        return world.broadcast(best is not None and best.step == step)

    def publish_best(self) -> None:
        """checkpoints/best.json, once that checkpoint is complete: retention spares it. Rank 0 writes."""
        world, metric = self.sampler.world, self.settings.best

        def write() -> None:
            write_json(self.run_dir / "checkpoints" / BEST, asdict(find_best(self.run_dir, metric)))

        world.together(lambda: write() if world.is_main else None)


def evaluation_file(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"{_PREFIX}{step:08d}.json"


def find_best(run_dir: Path, metric: str) -> BestStep | None:
    """Highest score, or lowest loss."""
    found = []
    for step, file in _evaluations(run_dir).items():
        result = json.loads(file.read_text(encoding="utf-8"))
        value = result["loss"] if metric == "loss" else result["scores"].get(metric, {}).get("mean")
        if value is not None:
            found.append((value if metric == "loss" else -value, step, value))
    if not found:
        return None
    _, step, value = min(found)
    return BestStep(step, metric, value)


def _evaluations(run_dir: Path) -> dict[int, Path]:
    """Files of finished evaluations by step, in order."""
    files = sorted((run_dir / "evaluations").glob(f"{_PREFIX}*.json"))
    return {int(file.stem.removeprefix(_PREFIX)): file for file in files}

"""Evaluation on two ranks: while training, over partitions, and after a stop."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ssgen_ds.distributed.world import World
from ssgen_ds.errors import StopRequested
from ssgen_ds.evaluate.evaluate import evaluate_in
from ssgen_ds.inference.answers import AnswerSettings
from ssgen_ds.inference.session import InferenceSettings
from ssgen_ds.train import fit_and_export
from tests.support.rank_runs import checkpoints_of, fresh, metrics_of, trained, weights_hash, zero
from tests.support.ranks import ranks
from tests.support.stopping import stopping

HOW = AnswerSettings(max_new_tokens=12, temperature=1.0, correct=2, samples=2)
TRAINING: dict[str, Any] = {
    "method__name": "bss",
    "deepspeed": zero(3),
    "data__eval_fraction": 0.3,
    "eval__every": 1,
    "eval__metrics": ["rouge", "em"],
    "eval__max_new_tokens": 12,
    "eval__temperature": 1.0,
    "eval__best": "loss",
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
    "train__lr": 0.3,  # so high that the loss soon grows: the best step is not the last
}


def stopping_at(world: World, phase: str, number: int) -> World:
    """All ranks are asked to stop when they enter the phase for the `number`th time."""
    stopped = stopping(world, phase)
    tick, counter = stopped.phases.tick, count(1)
    stopped.phases.tick = lambda name="": tick("" if name == phase and next(counter) < number else name)
    return stopped


def predictions(file: Path) -> list[dict[str, Any]]:
    lines = file.with_name(f"{file.stem}.predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def evaluations_of(run: Path) -> dict[str, str]:
    """Files by name, without what differs between runs."""
    files = sorted((run / "evaluations").iterdir())
    texts = {file.name: file.read_text("utf-8").replace(str(run), "RUN") for file in files}
    return {name: re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', text) for name, text in texts.items()}


class Evaluated(NamedTuple):
    whole: Path  # undisturbed
    cut: Path  # stopped in the evaluation after every step
    stops: list[str]  # what each stop said


@pytest.fixture(scope="module")
def runs(world, folder) -> Evaluated:
    whole, recipe = (fresh(folder, f"evaluated-{name}", world, **TRAINING) for name in ("whole", "cut"))
    trained(whole, world)
    cut, stops = Path(recipe.output_dir), []
    while not (cut / "finished.json").is_file() and len(stops) < 9:
        try:
            fit_and_export(recipe, stopping_at(world, "evaluate", 2))  # 1 is the one that the stop before cut short
        except StopRequested as stop:
            stops.append(str(stop))
        world.barrier()
    return Evaluated(Path(whole.output_dir), cut, stops)


@ranks(2)
def test_stopped_in_every_evaluation_is_the_same_run(runs):
    """Each evaluation is made after the resume; weights, rows and every prediction are those of an undisturbed run."""
    assert [stop.split(";")[0] for stop in runs.stops] == [f"stopped on request at step {i}" for i in (1, 2, 3, 4)]
    names = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    evaluations = evaluations_of(runs.whole)
    assert list(evaluations) == sorted(f"{name}{end}" for name in names for end in (".json", ".predictions.jsonl"))
    assert evaluations == evaluations_of(runs.cut)
    assert weights_hash(runs.whole) == weights_hash(runs.cut)
    assert metrics_of(runs.whole) == metrics_of(runs.cut)


@ranks(2)
def test_the_best_checkpoint_is_kept_beside_the_newest(runs):
    files = {name: text for name, text in evaluations_of(runs.whole).items() if "predictions" not in name}
    losses = [json.loads(text)["loss"] for text in files.values()]
    best = 1 + losses.index(min(losses))
    assert 1 <= best < 4, "the settings are made so that the last step is not the best"
    for run in (runs.whole, runs.cut):
        found = json.loads((run / "checkpoints" / "best.json").read_text())
        assert found == {"step": best, "metric": "loss", "value": min(losses)}
        assert checkpoints_of(run) == ["best.json", f"step-0000000{best}", "step-00000004"]


@ranks(1, 2)
def test_answers_drawn_while_training_do_not_depend_on_the_ranks(world, folder, kept):
    """Of a model that training hardly moves."""
    recipe = fresh(folder, "evaluated-still", world, **TRAINING | {"train__lr": 1e-12, "train__max_steps": 1})
    file = trained(recipe, world) / "evaluations" / "step-00000001.json"
    answers = [row["prediction"] for row in predictions(file)]
    if world.size == 1:
        kept["alone"] = answers
        assert len(set(answers)) > 2
    assert answers == kept["alone"]


@ranks(2)
def test_a_partitioned_model_gives_the_answers_of_a_whole_one(world, folder):
    """A folder, runs, their checkpoints and adapters give the same predictions whole and partitioned over the ranks."""
    models: dict[str, str] = {"folder": str(folder / "llama")}
    for kind in ("none", "lora"):
        run = trained(fresh(folder, f"to-evaluate-{kind}", world, adapter__kind=kind, method__name="sft"), world)
        models[f"run-{kind}"] = str(run)
        models[f"checkpoint-{kind}"] = str(run / "checkpoints" / "step-00000004")
    answers = {}
    for name, model in models.items():
        found = []
        for how, deepspeed in (("whole", None), ("partitioned", zero(3))):
            where = InferenceSettings(model, str(folder / "train.jsonl"), limit=7, batch=2, deepspeed=deepspeed)
            out = folder / f"{name}-{how}.json"
            evaluate_in(world, where, HOW, ["rouge", "em"], out)
            world.barrier()
            found.append([one["turns"] for one in predictions(out)])
        assert found[0] == found[1], name
        answers[name] = json.dumps(found[0])
        assert len(found[0]) == 14
    assert len(set(answers.values())) == 3, "the folder, the run trained in full, and the adapter differ"


@ranks(2)
def test_a_stopped_evaluation_goes_on_after_the_answers_it_has(world, folder):
    where = InferenceSettings(str(folder / "llama"), str(folder / "train.jsonl"), batch=1)
    whole, cut, partial = folder / "undisturbed.json", folder / "stopped.json", folder / ".stopped.partial.jsonl"
    evaluate_in(world, where, HOW, ["em"], whole)
    for passes in (200, 150):
        with pytest.raises(StopRequested) as stop:
            evaluate_in(stopping_at(world, "pass", passes), where, HOW, ["em"], cut)
        assert "of 26 prompts are answered" in str(stop.value)
        world.barrier()
    assert 0 < len(partial.read_text("utf-8").splitlines()) - 1 < 52
    world.barrier()  # before it is taken away
    evaluate_in(world, where, HOW, ["em"], cut)
    world.barrier()
    assert not partial.exists()
    results = [json.loads(file.read_text("utf-8")) for file in (whole, cut)]
    for result in results:
        result.pop("seconds"), result.pop("predictions")
    assert results[0] == results[1] and predictions(whole) == predictions(cut)

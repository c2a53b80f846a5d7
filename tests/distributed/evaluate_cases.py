"""Evaluation on real ranks: cases of `test_evaluate.py`."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from ssgen_ds.config import Recipe
from ssgen_ds.distributed import World
from ssgen_ds.errors import StopRequested
from ssgen_ds.evaluate.answers import AnswerSettings
from ssgen_ds.evaluate.run import evaluate_in
from ssgen_ds.inference import InferenceSettings
from ssgen_ds.train import fit_and_export
from tests.distributed.numerics_cases import fresh, metrics_of, weights_hash
from tests.support.stopping import stopping

HOW = AnswerSettings(max_new_tokens=12, temperature=1.0, correct=2, samples=2)
TRAINING: dict[str, Any] = {
    "method__name": "bss",
    "deepspeed": "ds_configs/zero3.json",
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


def evaluations_of(recipe: Recipe) -> dict[str, Any]:
    files = sorted((Path(recipe.output_dir) / "evaluations").iterdir())
    texts = {file.name: file.read_text("utf-8").replace(recipe.output_dir, "RUN") for file in files}
    return {name: re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', text) for name, text in texts.items()}


def training_case(world: World, folder: Path) -> dict[str, Any]:
    """Undisturbed, and stopped in the evaluation after every step."""
    whole, cut = (fresh(folder, f"evaluated-{name}", world, **TRAINING) for name in ("whole", "cut"))
    fit_and_export(whole, world)
    stops = []
    while not (Path(cut.output_dir) / "finished.json").is_file() and len(stops) < 9:
        try:
            fit_and_export(cut, _stopping_at(world, "evaluate", 2))  # 1 is the one that the stop before has cut short
        except StopRequested as stop:
            stops.append(str(stop))
        world.barrier()
    runs = [Path(recipe.output_dir) for recipe in (whole, cut)]
    return {
        "stops": stops,
        "evaluations": list(evaluations_of(whole)),
        "same_evaluations": evaluations_of(whole) == evaluations_of(cut),
        "same_weights": weights_hash(runs[0]) == weights_hash(runs[1]),
        "same_metrics": metrics_of(runs[0]) == metrics_of(runs[1]),
        "checkpoints": [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in runs],
        "best": [json.loads((run / "checkpoints" / "best.json").read_text()) for run in runs],
        "losses": [
            json.loads(text)["loss"] for name, text in evaluations_of(whole).items() if "predictions" not in name
        ],
    }


def still_case(world: World, folder: Path) -> list[str]:
    """Answers, drawn while training, of a model that training hardly moves: those of any number of ranks."""
    recipe = fresh(folder, "evaluated-still", world, **TRAINING | {"train__lr": 1e-12, "train__max_steps": 1})
    fit_and_export(recipe, world)
    return [row["prediction"] for row in predictions(Path(recipe.output_dir) / "evaluations" / "step-00000001.json")]


def predictions(file: Path) -> list[dict[str, Any]]:
    lines = file.with_name(f"{file.stem}.predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def partitioned_case(world: World, folder: Path) -> dict[str, Any]:
    """Run, checkpoint, adapter and folder give the same predictions whole and partitioned over the ranks."""
    models: dict[str, str] = {"folder": str(folder / "llama")}
    for kind in ("none", "lora"):
        recipe = fresh(folder, f"to-evaluate-{kind}", world, adapter__kind=kind, method__name="sft")
        fit_and_export(recipe, world)
        models[f"run-{kind}"] = recipe.output_dir
        models[f"checkpoint-{kind}"] = str(Path(recipe.output_dir) / "checkpoints" / "step-00000004")
    found = {}
    for name, model in models.items():
        for how in ("whole", "partitioned"):
            deepspeed = "ds_configs/zero3.json" if how == "partitioned" else None
            where = InferenceSettings(model, str(folder / "train.jsonl"), limit=7, batch=2, deepspeed=deepspeed)
            out = folder / f"{name}-{how}.json"
            evaluate_in(world, where, HOW, ["rouge", "em"], out)
            world.barrier()
            found[name, how] = [one["turns"] for one in predictions(out)]
    return {
        "same": [name for name in models if found[name, "whole"] == found[name, "partitioned"]],
        "models": list(models),
        "distinct": len({json.dumps(found[name, "whole"]) for name in models}),
        "answers": len(found["folder", "whole"]),
    }


def stopped_case(world: World, folder: Path) -> dict[str, Any]:
    """An evaluation that is stopped goes on after the answers it has; the result is that of an undisturbed one."""
    where = InferenceSettings(str(folder / "llama"), str(folder / "train.jsonl"), batch=1)
    whole, cut = folder / "undisturbed.json", folder / "stopped.json"
    evaluate_in(world, where, HOW, ["em"], whole)
    said = []
    for passes in (200, 150):
        try:
            evaluate_in(_stopping_at(world, "pass", passes), where, HOW, ["em"], cut)
        except StopRequested as stop:
            said.append(str(stop))
        world.barrier()
    kept = len((folder / ".stopped.partial.jsonl").read_text("utf-8").splitlines()) - 1
    evaluate_in(world, where, HOW, ["em"], cut)
    world.barrier()
    results = [json.loads(file.read_text("utf-8")) for file in (whole, cut)]
    for result in results:
        result.pop("seconds"), result.pop("predictions")
    return {
        "said": said,
        "kept": kept,
        "left": (folder / ".stopped.partial.jsonl").exists(),
        "same": results[0] == results[1] and predictions(whole) == predictions(cut),
    }


def _stopping_at(world: World, phase: str, number: int) -> World:
    """All ranks are asked to stop when they enter the phase for the `number`th time."""
    stopped = stopping(world, phase)
    tick, counter = stopped.phases.tick, count(1)
    stopped.phases.tick = lambda name="": tick("" if name == phase and next(counter) < number else name)
    return stopped


CASES = {"training": training_case, "partitioned": partitioned_case, "stopped": stopped_case, "still": still_case}

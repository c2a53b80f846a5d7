"""Runs of the list, one after the other, in one process group: starting a process for each takes long."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.study.settings import Run, Settings, max_answer, recipe_of
from ssgen_ds.distributed.world import World
from ssgen_ds.run.logbook import read_rows


def result_path(folder: Path, run: Run) -> Path:
    return folder / "results" / f"{run.name}.json"


def work(queue: Any, settings: Settings, folder: Path) -> None:
    """Take runs from the queue until there is none. The body of a process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import torch

    from ssgen_ds.distributed.launch import quiet_libraries
    from ssgen_ds.distributed.process_group import process_group

    torch.set_num_threads(1)
    quiet_libraries()
    with process_group() as world:
        for run in iter(queue.get, None):
            started = time.perf_counter()
            result = do(run, settings, folder, world)
            right = sum(result["greedy"]) / len(result["greedy"])
            seconds = time.perf_counter() - started
            print(f"{time.strftime('%H:%M:%S')} {run.name}: greedy {right:.3f}, {seconds:.0f} s", flush=True)


def do(run: Run, settings: Settings, folder: Path, world: World) -> dict[str, Any]:
    """Train by the recipe as `ssgen train` does, measure, write the result."""
    from bench.study.measure import Subject, measure
    from ssgen_ds.train import fit_and_export

    recipe = recipe_of(run, settings, folder)
    run_dir = Path(recipe.output_dir)
    shutil.rmtree(run_dir, ignore_errors=True)  # what a stopped study has left
    started, started_cpu = time.perf_counter(), time.process_time()
    with open(folder / f"{run.name}.log", "w", encoding="utf-8") as log, redirect_stdout(log):
        fit_and_export(recipe, world)
    trained, cpu = time.perf_counter(), time.process_time() - started_cpu
    answer = max_answer(settings.tasks[run.task], run.task)
    subject = Subject(run_dir / "model", folder / f"{run.task}-eval.jsonl", answer, world)
    corrects = recipe.method.uses_rac
    sft = None if run.method == "sft" else _contexts_of_sft(folder, run)
    found, own = measure(subject, corrects, sft)
    if run.method == "sft":
        (run_dir / "contexts.json").write_text(json.dumps(list(own.items())), encoding="utf-8")
    times = _times(run_dir) | {"train": trained - started, "train_cpu": cpu, "measure": time.perf_counter() - trained}
    result = {**asdict(run), "seconds": times, "generated": _generated(run_dir), **found}
    path = result_path(folder, run)
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(result), encoding="utf-8")
    path.with_suffix(".partial").replace(path)
    shutil.rmtree(run_dir / "selfgen", ignore_errors=True)
    gc.collect()  # engines hold themselves in cycles
    return result


def _contexts_of_sft(folder: Path, run: Run) -> dict[float, list[list[int]]]:
    file = folder / "runs" / Run(run.task, "sft", run.seed).name / "contexts.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _generated(run_dir: Path) -> list[dict[str, float | None]]:
    """By quarter of the run: the share of drafts that are the gold answer, and of context tokens that are not gold."""
    from ssgen_ds.selfgen.round_file import read_round

    rounds = [read_round(path) for path in sorted((run_dir / "selfgen").glob("round-*.parquet"))]
    quarters, pieces = [], min(4, len(rounds))
    for number in range(pieces):
        part = rounds[number * len(rounds) // pieces : (number + 1) * len(rounds) // pieces]
        records = [record for group in part for record in group]
        drafts = [record.draft.ids == record.gold_ids[:-1] for record in records if record.draft]
        pairs = [(record.mixed.ids, record.gold_ids) for record in records if record.mixed]
        wrong = sum(a != b for mixed, gold in pairs for a, b in zip(mixed, gold, strict=True))
        quarters.append(
            {
                "drafts_right": sum(drafts) / len(drafts) if drafts else None,
                "wrong_in_context": wrong / sum(len(gold) for _, gold in pairs) if pairs else None,
            }
        )
    return quarters


def _times(run_dir: Path) -> dict[str, float]:
    """Of the steps, and of the generation between them: sums over the run."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return {
        "steps": sum(row["step_seconds"] for row in rows),
        "generation": sum(row["selfgen_seconds"] for row in rows),
        "last_loss": sum(row["loss"] for row in rows[-20:]) / len(rows[-20:]),
        "sampled_token_share": sum(row["sampled_token_share"] for row in rows) / len(rows),
        "num_steps": len(rows),
    }

"""The controlled study: python -m bench.study.run [--folder FOLDER] [--jobs 2] [--summary]

Trains and measures every run of the list that has no result yet in the folder, then writes the summary of all that
have: bench/results/study-controlled.json, its plots, and docs/results-controlled.md. Stop it at any time and start it
again: at most one run for each job is made anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.study.settings import Run, Settings, list_runs
from bench.study.summary import write_summary
from bench.study.tasks import save_model, write_data
from bench.study.worker import result_path, work

ROOT = Path(__file__).parents[2]


def prepare(settings: Settings, folder: Path) -> None:
    """Data and fresh models; the settings that results in this folder are of. Methods and seeds may be added later.

    Raises:
        SystemExit: the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, content = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    if file.is_file() and _sizes(json.loads(file.read_text(encoding="utf-8"))) != _sizes(content):
        raise SystemExit(f"{folder} holds results of other settings; name another --folder or remove it")
    for task, size in settings.tasks.items():
        write_data(folder, task, size.num_train, size.train_lengths, size.eval_lengths, settings.eval_each)
    for seed in settings.seeds:
        save_model(folder / f"model-{seed}", seed, settings.layers, settings.width)
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _sizes(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("methods", "seeds")}


def run_all(settings: Settings, folder: Path, jobs: int) -> list[Run]:
    """Make the runs that have no result yet in `jobs` processes; the runs that still have none."""
    todo = [run for run in list_runs(settings) if not result_path(folder, run).is_file()]
    print(f"{len(todo)} of {len(list_runs(settings))} runs to make", flush=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for run in todo + [None] * jobs:
        queue.put(run)
    workers = [context.Process(target=work, args=(queue, settings, folder), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    queue.cancel_join_thread()
    return [run for run in todo if not result_path(folder, run).is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description="The controlled study.")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study-controlled")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one core each")
    parser.add_argument("--summary", action="store_true", help="make no run: only sum up what is there")
    options = parser.parse_args()
    settings = Settings()
    failed: list[Run] = []
    if not options.summary:
        prepare(settings, options.folder)
        failed = run_all(settings, options.folder, options.jobs)
    write_summary(settings, options.folder, ROOT / "bench" / "results", ROOT / "docs")
    if failed:
        raise SystemExit(f"no result of {', '.join(run.name for run in failed)}")


if __name__ == "__main__":
    main()

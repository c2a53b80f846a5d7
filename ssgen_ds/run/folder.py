"""Create, recognise, continue or refuse a run folder. Another run never overwrites anything in it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssgen_ds.distributed.launch import is_restart
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.full_paths import with_full_paths
from ssgen_ds.recipe.load import changed_keys, dump_recipe, parse_recipe
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.evaluations import check_evaluations
from ssgen_ds.run.files import write_whole
from ssgen_ds.run.finished_model import sizes
from ssgen_ds.run.layout import (
    ATTEMPTS_FILE,
    CHECKPOINTS_FOLDER,
    ENVIRONMENT_FILE,
    FINISHED_FILE,
    LOCK_FILE,
    LOCK_REMNANTS,
    METRICS_FILE,
    MODEL_FOLDER,
    PARTIAL,
    RECIPE_FILE,
    SAMPLES_FILE,
    TEMPLATE_FILE,
)
from ssgen_ds.run.read_back import SampleRow, WholeStepRow, each_row, read_mapping, read_rows

_LOG_NAME = re.compile(r"^slurm-|\.(out|err|log|[oe]\d+)$")
PACKAGES = ("ssgen-ds", "torch", "deepspeed", "transformers", "peft", "datasets", "numpy")


def open_run(recipe: Recipe) -> None:
    """Rank 0 checks whether this recipe may be trained in its output_dir.

    Raises UserError when output_dir belongs to something else, or to a run whose recipe trains differently.
    """
    run_dir = Path(recipe.output_dir)
    saved = run_dir / RECIPE_FILE
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir: {run_dir} is a file")
    remnants = *run_dir.glob(LOCK_REMNANTS), *run_dir.glob(f"{PARTIAL}*")
    ours = {run_dir / LOCK_FILE, run_dir / ATTEMPTS_FILE, *remnants}
    if run_dir.is_dir() and any(path not in ours and not _is_log(path) for path in run_dir.iterdir()):
        if not saved.is_file():
            kept = next((run_dir / CHECKPOINTS_FOLDER).glob(f"step-*/{RECIPE_FILE}"), None)
            if kept is not None:
                raise UserError(
                    f"output_dir: {run_dir} has lost its {RECIPE_FILE}; restore it, for instance from {kept}"
                )
            raise UserError(f"output_dir: {run_dir} is not empty and not a run folder; name another")
        if recipe.resume == "never" and not is_restart():
            raise UserError(f"output_dir: {run_dir} holds a run and resume is never; name another, or resume=auto")
        refuse_changes(saved, recipe, f"output_dir: {run_dir} holds a run with another recipe")
        check_records(run_dir)


def _is_log(path: Path) -> bool:
    """Whether this is a log that a batch system or the user put next to the run."""
    if path.is_dir():
        return path.name in ("log", "logs", "slurm") and all(_is_log(inner) for inner in path.iterdir())
    return _LOG_NAME.search(path.name) is not None


def check_records(run_dir: Path) -> None:
    """Check that the files a run keeps can be read when it continues: here, and not after the training.

    Raises UserError with every damaged file.
    """
    metrics, samples = run_dir / METRICS_FILE, run_dir / SAMPLES_FILE
    checks = [
        lambda: read_rows(metrics, WholeStepRow) if metrics.is_file() else None,
        lambda: deque(each_row(samples, SampleRow), maxlen=0) if samples.is_file() else None,
        lambda: check_evaluations(run_dir),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))


def refuse_changes(saved: Path, recipe: Recipe, what: str) -> None:
    """Refuse a recipe that differs from the run's own in anything that changes the training."""
    if changes := changed_keys(with_full_paths(read_recipe(saved)), with_full_paths(recipe)):
        raise UserError.from_list(
            f"{what}; undo the changes, or start afresh in another output_dir (from the weights trained so far: "
            "model.path=RUN/model, after an adapter model.adapter_path=RUN/model)",
            changes,
        )


def read_recipe(file: Path) -> Recipe:
    """The recipe that a run keeps. Raises UserError naming the file when it is damaged."""
    return parse_recipe(read_mapping(file, "restore it; each checkpoint of the run holds a copy"), str(file))


def is_finished(run_dir: Path) -> bool:
    """Whether the run in this folder has trained all its steps and exported the model."""
    return (run_dir / FINISHED_FILE).is_file()


def is_done(recipe: Recipe) -> bool:
    """Whether the run in output_dir is finished, and the recipe asks for no more steps or epochs than it has."""
    run_dir = Path(recipe.output_dir)
    if not is_finished(run_dir):
        return False
    train, before = recipe.train, read_recipe(run_dir / RECIPE_FILE).train
    if train.max_steps and before.max_steps:
        return train.max_steps <= before.max_steps
    if train.epochs and before.epochs:
        return train.epochs <= before.epochs
    return False


def mark_finished(run_dir: Path, step: int, **facts: Any) -> None:
    """Write the last file of a run: what its model consists of, and `facts` for people."""
    content = {"step": step, "time": _now(), MODEL_FOLDER: sizes(run_dir / MODEL_FOLDER), **facts}
    write_whole(run_dir / FINISHED_FILE, json.dumps(content))


def start_run(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Write the resolved recipe, which makes the folder a run's, and the environment (rank 0).

    Paths become absolute and the chat template is copied, so that the run can be used from anywhere. A finished run
    that continues is not finished any more. Its mark is removed first, so that no kill leaves a run marked as finished
    whose recipe asks for more steps than were trained.
    """
    run_dir = Path(recipe.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)
    if recipe.data.chat_template is not None:
        write_whole(run_dir / TEMPLATE_FILE, Path(recipe.data.chat_template).expanduser().read_text(encoding="utf-8"))
    write_whole(run_dir / RECIPE_FILE, dump_recipe(with_full_paths(recipe)))
    write_whole(run_dir / ENVIRONMENT_FILE, json.dumps(environment, indent=2))


def describe_environment(**facts: Any) -> dict[str, Any]:
    """Versions, command and commit, with what the caller knows (ranks, device, ZeRO stage)."""
    return {
        "time": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": _git_commit(),
        **facts,
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the libraries that decide what a run computes."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

"""The run folder: created, recognised, continued or refused; nothing in it is ever overwritten by another run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ssgen_ds.attempts import ATTEMPTS_FILE
from ssgen_ds.config import Recipe, changed_keys, dump_recipe, parse_recipe
from ssgen_ds.errors import UserError
from ssgen_ds.files import PARTIAL, write_whole
from ssgen_ds.recovery import is_restart
from ssgen_ds.run_lock import LOCK_FILE, LOCK_REMNANTS

PACKAGES = ("ssgen-ds", "torch", "deepspeed", "transformers", "peft", "datasets", "numpy")


def open_run(recipe: Recipe) -> None:
    """Rank 0's first look: may this recipe be trained in its output_dir?

    Raises UserError when output_dir belongs to something else, or to a run whose recipe trains differently.
    """
    run_dir = Path(recipe.output_dir)
    saved = run_dir / "recipe.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir: {run_dir} is a file")
    ours = {run_dir / LOCK_FILE, run_dir / ATTEMPTS_FILE, *run_dir.glob(LOCK_REMNANTS), *run_dir.glob(f"{PARTIAL}*")}
    if run_dir.is_dir() and set(run_dir.iterdir()) - ours:
        if not saved.is_file():
            raise UserError(f"output_dir: {run_dir} is not empty and not a run folder; name another")
        if recipe.resume == "never" and not is_restart():
            raise UserError(f"output_dir: {run_dir} holds a run and resume is never; name another, or resume=auto")
        refuse_changes(saved, recipe, f"output_dir: {run_dir} holds a run with another recipe")


def refuse_changes(saved: Path, recipe: Recipe, what: str) -> None:
    """A run goes on only by the recipe that it began with, in everything that changes the training."""
    previous = parse_recipe(yaml.safe_load(saved.read_text(encoding="utf-8")), str(saved))
    if changes := changed_keys(previous, recipe):
        raise UserError.from_list(f"{what}; undo the changes or start afresh in another output_dir", changes)


def is_finished(run_dir: Path) -> bool:
    """Whether the run in this folder has trained all its steps and exported the model."""
    return (run_dir / "finished.json").is_file()


def mark_finished(run_dir: Path, step: int, **facts: Any) -> None:
    """The last thing that a run writes; `facts` are for reading."""
    write_whole(run_dir / "finished.json", json.dumps({"step": step, "time": _now(), **facts}))


def start_run(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Write the resolved recipe, which makes the folder a run's, and the environment (rank 0)."""
    run_dir = Path(recipe.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "recipe.yaml", dump_recipe(recipe))
    write_whole(run_dir / "environment.json", json.dumps(environment, indent=2))


def describe_environment(**facts: Any) -> dict[str, Any]:
    """Versions, command, commit, and what the caller knows (ranks, device, ZeRO stage)."""
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
    """Of the libraries that decide what a run computes."""
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

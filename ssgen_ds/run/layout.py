"""The names of the files and folders in a run folder. Every room that writes or reads one takes its name from here."""

from __future__ import annotations

import re
from pathlib import Path

# The run folder itself.
RECIPE_FILE = "recipe.yaml"  # resolved; each checkpoint holds a copy
ENVIRONMENT_FILE = "environment.json"
TEMPLATE_FILE = "chat_template.jinja"  # the run's copy of data.chat_template
METRICS_FILE = "metrics.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
FINISHED_FILE = "finished.json"  # only a run that has exported its model has it
REPORT_FILE = "report.html"
WANDB_ID_FILE = "wandb-run-id"
LOCK_FILE = "LOCK"
LOCK_REMNANTS = f".{LOCK_FILE}-*"  # glob: claims that a kill left behind, and beats of an older version
MODEL_FOLDER = "model"
TENSORBOARD_FOLDER = "tensorboard"
PARTIAL = ".partial-"  # before the name of a file or folder that is not complete

SELFGEN_FOLDER = "selfgen"
SAMPLES_FILE = f"{SELFGEN_FOLDER}/samples.jsonl"
CALL_COST_FILE = f"{SELFGEN_FOLDER}/call_cost.json"

CHECKPOINTS_FOLDER = "checkpoints"
BEST_FILE = f"{CHECKPOINTS_FOLDER}/best.json"  # the step whose evaluation is best
# One checkpoint.
MARKER, INDEX, STATE, ROUND = "COMPLETE", "index.json", "state.json", "round.parquet"
SHARDS = "shard-*.safetensors"  # glob

EVALUATIONS_FOLDER = "evaluations"
GAP_FOLDER, GAP_FILE = "gap", "gap.json"  # a second measurement in the same folder has another file name
FIGURE_SUFFIX = ".png"  # of the figure next to a gap's JSON

CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
_STEP_EVALUATION = re.compile(r"step-(\d{8,})\.json")


def round_path(run_dir: Path, number: int) -> Path:
    """The file of the 1-based self-generation round."""
    return run_dir / SELFGEN_FOLDER / f"round-{number:05d}.parquet"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def evaluation_file(run_dir: Path, step: int) -> Path:
    """The evaluation that training makes after a step."""
    return run_dir / EVALUATIONS_FOLDER / f"step-{step:08d}.json"


def evaluations_by_step(run_dir: Path) -> dict[int, Path]:
    """Files of the evaluations that training has finished, in order; files with other names are left out."""
    files = sorted((run_dir / EVALUATIONS_FOLDER).glob("step-*.json"))
    return {int(found[1]): file for file in files if (found := _STEP_EVALUATION.fullmatch(file.name))}


def is_name_of_training(file: Path) -> bool:
    """Whether only training writes evaluations with this name."""
    return _STEP_EVALUATION.fullmatch(file.name) is not None


def predictions_file(result: Path) -> Path:
    """The predictions of an evaluation, next to its JSON file."""
    return result.with_name(f"{result.stem}.predictions.jsonl")


def journal_file(result: Path) -> Path:
    """The answers so far of an evaluation that is to be written to `result`."""
    return result.with_name(f".{result.stem}.partial.jsonl")

"""Where `ssgen evaluate` writes, and what its result describes. Rank 0 decides before any weight loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssgen_ds.checkpoint.save import read_state
from ssgen_ds.errors import UserError
from ssgen_ds.inference.answers import AnswerSettings
from ssgen_ds.inference.model_source import ModelSource, fingerprint
from ssgen_ds.inference.session import Inference, InferenceSettings, check_out
from ssgen_ds.run.evaluations import FIX, free_file, is_ours
from ssgen_ds.run.files import check_writable
from ssgen_ds.run.layout import (
    EVALUATIONS_FOLDER,
    FINISHED_FILE,
    MARKER,
    RECIPE_FILE,
    is_name_of_training,
    journal_file,
    predictions_file,
)
from ssgen_ds.run.read_back import read_mapping
from ssgen_ds.run.result_names import digest, metrics_part, setting_parts

_SHOWN = ("model", "data", "num_examples")  # of a result, besides its settings


def run_of(model: str) -> Path | None:
    """The run folder that `--model` names, or whose checkpoint it names. None: it names neither."""
    path = Path(model).expanduser()
    if (path / MARKER).is_file():
        return path.resolve().parent.parent
    return path if (path / RECIPE_FILE).is_file() else None


def step_of_model(model: str, model_source: ModelSource) -> int | None:
    """The optimizer step whose weights these are; None where no run trained the model, or nothing tells the step."""
    if model_source.checkpoint is not None:
        return read_state(model_source.checkpoint).step
    run_dir = run_of(model)
    if run_dir is None:
        return None
    try:
        step = json.loads((run_dir / FINISHED_FILE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def model_identity(model: str, model_source: ModelSource, out: Path | None) -> list[str]:
    """Identify the weights: a run's by their step, others by the names, sizes and times of their files.

    For a result in the run's own folder (`out` is None, or inside it) the folder's path does not count: it may move.
    """
    run_dir, step = run_of(model), step_of_model(model, model_source)
    if run_dir is not None and step is not None:
        is_inside = out is None or run_dir.resolve() in out.resolve().parents
        return [*([] if is_inside else [str(run_dir.resolve())]), str(step)]
    first, *rest = fingerprint(model_source)
    return [str(Path(first).expanduser().resolve()) if Path(first).expanduser().exists() else first, *rest]


def result_identity(inference: Inference, how: AnswerSettings, metrics: list[str], out: Path | None) -> str:
    """A digest of what decides the answers and their scores. The data's path and the order of metrics do not count."""
    return digest(
        {
            "model": model_identity(inference.settings.model, inference.model_source, out),
            "how": asdict(how),
            "cue": inference.cue if how.correct else None,
            "metrics": sorted(metrics),
            "tokenizer": inference.chat.fingerprint(),
            "prompts": [len(inference.examples), inference.prompts_fingerprint],
        }
    )


def all_settings(inference: Inference, how: AnswerSettings) -> dict[str, Any]:
    """The settings as a result shows them."""
    return {**asdict(how), "prompt": inference.settings.prompt, "limit": inference.settings.limit}


def find_result_file(
    out: Path | None, inference: Inference, how: AnswerSettings, metrics: list[str], identity: str
) -> Path:
    """`out`, or a name in the run's evaluations/ that shows the settings.

    Raises UserError: it cannot be written, or another result would be replaced.
    """
    if out is not None:
        _check_given(out, inference, how, identity)
        return out
    run_dir = run_of(inference.settings.model)
    if run_dir is None:
        raise UserError("--out: name the JSON file to write (a run folder keeps its own in evaluations/)")
    folder = make_folder(run_dir / EVALUATIONS_FOLDER, "a JSON file")
    return free_file(folder, inference.settings.data, _parts(inference, how, metrics), identity)


def make_folder(folder: Path, what: str) -> Path:
    """A folder of a run to write in; made if it does not exist. Raises UserError where the run is read-only."""
    try:
        folder.mkdir(exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); name {what} elsewhere with --out") from None
    return folder


def _parts(inference: Inference, how: AnswerSettings, metrics: list[str]) -> list[str]:
    step = step_of_model(inference.settings.model, inference.model_source)
    settings, defaults = asdict(inference.settings), asdict(InferenceSettings("", ""))
    changed = setting_parts(asdict(how) | settings, asdict(AnswerSettings()) | defaults)
    return [*([] if step is None else [f"step{step}"]), *changed, *filter(None, [metrics_part(metrics)])]


def _check_given(out: Path, inference: Inference, how: AnswerSettings, identity: str) -> None:
    check_out(out)
    predictions = predictions_file(out)
    if out.suffix != ".json":
        raise UserError(f"--out: {out} must end in .json; the predictions go into {predictions.name} beside it")
    if out.parent.name == EVALUATIONS_FOLDER and is_name_of_training(out):
        raise UserError(f"--out: {out} is the name of an evaluation that training makes; name another")
    if not is_ours(out, identity):
        problem = _what_it_is(out, inference, how)
        raise UserError(f"--out: {out} {problem}; name another file, or delete it and its predictions")
    if predictions.exists() and not (out.exists() or journal_file(out).exists()):
        raise UserError(f"--out: {predictions} is there already and would be replaced; name another file, or delete it")


def _what_it_is(out: Path, inference: Inference, how: AnswerSettings) -> str:
    """Why a file that is in the way is not the result to come."""
    there = read_mapping(out, FIX)
    if "kind" not in there or there["kind"] != "evaluation":
        return "is no evaluation and would be replaced"
    if "identity" not in there:
        return "was evaluated by an earlier version, which did not note by which weights and rows"
    here = dict(zip(_SHOWN, (inference.settings.model, inference.settings.data, len(inference.examples)), strict=True))
    here |= all_settings(inference, how)
    settings = there.get("settings")
    told = {key: there[key] for key in _SHOWN if key in there} | (settings if isinstance(settings, dict) else {})
    other = [f"{key} {told[key]} there, {here[key]} here" for key in here if key in told and told[key] != here[key]]
    return f"holds another evaluation ({', '.join(other) or 'of other weights, rows or metrics'})"

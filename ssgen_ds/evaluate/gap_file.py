"""Where `ssgen gap` writes. It never replaces another measurement. Rank 0 decides."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.gap_measure import GapSettings
from ssgen_ds.evaluate.gap_options import check_folder
from ssgen_ds.evaluate.result_file import make_folder, model_identity, run_of, step_of_model
from ssgen_ds.inference.session import Inference, InferenceSettings
from ssgen_ds.run.evaluations import GAP_FIX, free_file, is_ours
from ssgen_ds.run.layout import GAP_FILE, GAP_FOLDER
from ssgen_ds.run.result_names import digest, setting_parts


def find_folder(out: Path | None, models: list[str]) -> Path:
    """The folder for the results. Raises UserError where they cannot be written."""
    check_folder(out, models)
    if out is not None:
        return out
    run_dir = run_of(models[0])
    if run_dir is None:
        raise UserError("--out: name the folder to write (a single run folder keeps its own in gap/)")
    return make_folder(run_dir / GAP_FOLDER, "a folder")


def gap_identity(measured: list[tuple[str, Inference]], how: GapSettings, out: Path | None) -> str:
    """A digest of what decides the numbers. `measured`: what the user calls each model, and its inference."""
    opened = measured[0][1]
    return digest(
        {
            "models": [model_identity(model, inference.model_source, out) for model, inference in measured],
            "how": asdict(how),
            "tokenizer": opened.chat.fingerprint(),
            "prompts": [len(opened.examples), opened.prompts_fingerprint],
        }
    )


def find_file(folder: Path, out: Path | None, trained: tuple[str, Inference], how: GapSettings, identity: str) -> Path:
    """gap.json, or where a run already has another one, a name with the settings and the step of `trained`.

    Raises UserError where `out` has another one.
    """
    file = folder / GAP_FILE
    if is_ours(file, identity, GAP_FIX):
        return file
    if out is not None:
        raise UserError(
            f"--out: {file} holds another measurement (of other models, weights, rows or settings); name another "
            "folder, or delete it"
        )
    model, inference = trained
    step = step_of_model(model, inference.model_source)
    settings, defaults = asdict(inference.settings), asdict(InferenceSettings("", ""))
    parts = setting_parts(asdict(how) | settings, asdict(GapSettings()) | defaults)
    return free_file(
        folder, inference.settings.data, [*([] if step is None else [f"step{step}"]), *parts], identity, GAP_FIX
    )

"""`ssgen export`: the trained model of a run or checkpoint as a Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from ssgen_ds.errors import Problems, UserError
from ssgen_ds.inference.model_source import ModelSource, load_model_source, resolve_model_source
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import OpenedModel, open_model, resolve_dtype
from ssgen_ds.modeling.merge import merge_adapter
from ssgen_ds.modeling.model_folder import TrainedAs, complete_folder, trained_as
from ssgen_ds.modeling.model_path import resolve_model_path
from ssgen_ds.run.files import whole_folder
from ssgen_ds.run.layout import MARKER, MODEL_FOLDER, RECIPE_FILE


def export_run(run: Path, out: Path, merge: bool, trust_remote_code: bool = False) -> None:
    """`ssgen export`: the trained model as a Hugging Face folder; with `merge`, the adapter folded into its base.

    An unfinished run exports its newest complete checkpoint.
    """
    problems, model_source = Problems(), None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.add([f"--out: {out} exists and is not empty"])
    if (run / RECIPE_FILE).is_file() or (run / MARKER).is_file():
        model_source = problems.ask(lambda: resolve_model_source(str(run), trust_remote_code))
    else:
        problems.add([f"{run}: neither a run folder (no recipe.yaml in it) nor a checkpoint"])
    problems.refuse()
    assert model_source is not None and model_source.recipe is not None
    if merge and model_source.recipe.adapter.kind == "none":
        raise UserError(f"--merge: {run} trained the whole model, there is no adapter to merge; leave --merge out")
    try:
        print(f"{out}: {_export(model_source, run, out, merge)}")
    except OSError as error:
        raise UserError(f"--out: {error}") from error


def _export(model_source: ModelSource, run: Path, out: Path, merge: bool) -> str:
    """Export, and say what was done. Raises OSError."""
    if merge:
        return f"merged; its logits differ from base + adapter by at most {_merge(model_source, out):.1e}"
    if model_source.checkpoint is None:
        _refuse_links_out(run)
        with whole_folder(out) as folder:
            shutil.copytree(run / MODEL_FOLDER, folder, dirs_exist_ok=True)
            # A run folder of an earlier version lacks what goes with the weights today.
            opened = _opened(model_source)
            complete_folder(folder, opened.tokenizer, _source(model_source), _trained_as(model_source, opened))
        return f"copied from {run / MODEL_FOLDER}"
    _save_checkpoint_model(model_source, out)
    return f"made from {model_source.checkpoint}"


def _refuse_links_out(run: Path) -> None:
    """A link in a folder from elsewhere could put any file of this machine into the export."""
    for file in (run / MODEL_FOLDER).rglob("*"):
        if not file.resolve().is_relative_to(run.resolve()):
            raise UserError(f"{file}: links to {file.resolve()}, which is not in the run: copy it there if it belongs")


def _merge(model_source: ModelSource, out: Path) -> float:
    assert model_source.recipe is not None
    dtype = resolve_dtype(model_source.model, "cuda" if torch.cuda.is_available() else "cpu")
    how = dtype, model_source.recipe.quantization, _trained_as(model_source, _opened(model_source))
    if model_source.adapter is not None:
        return merge_adapter(model_source.model, str(model_source.adapter), out, *how)
    with tempfile.TemporaryDirectory() as folder:
        _save_checkpoint_model(model_source, Path(folder))
        return merge_adapter(model_source.model, folder, out, *how)


def _save_checkpoint_model(model_source: ModelSource, out: Path) -> None:
    opened = _opened(model_source)
    model, trained = load_model_source(model_source, "cpu"), _trained_as(model_source, opened)
    save_model(model, opened.tokenizer, out, _source(model_source), is_main=True, trained=trained)


def _source(model_source: ModelSource) -> str:
    """What the run's model was trained from, as transformers finds it."""
    assert model_source.recipe is not None
    return resolve_model_path(model_source.recipe.model.path, model_source.recipe.model.revision).path


def _opened(model_source: ModelSource) -> OpenedModel:
    assert model_source.recipe is not None
    return open_model(model_source.model, model_source.recipe.data)


def _trained_as(model_source: ModelSource, opened: OpenedModel) -> TrainedAs:
    assert model_source.recipe is not None
    return trained_as(model_source.recipe, opened.chat)

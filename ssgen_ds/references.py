"""What `--model` may be: a run folder, a checkpoint, an adapter folder, a Hugging Face folder or id, a GGUF file."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ssgen_ds.checkpoint import MARKER, complete_checkpoints, open_weights
from ssgen_ds.config import AdapterConfig, ModelConfig, Recipe, parse_recipe
from ssgen_ds.data.paths import HUB_ID, PACKAGE_PREFIX
from ssgen_ds.ds_config import zero_stage
from ssgen_ds.errors import UserError
from ssgen_ds.files import whole_folder
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.export import merge_adapter, save_model
from ssgen_ds.modeling.gather import assign
from ssgen_ds.modeling.load import load_model, load_tokenizer, resolve_dtype, resolve_model_path, split_adapter
from ssgen_ds.modeling.zero3 import partition_rest

WEIGHT_FILES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Reference:
    """A model to load, and the recipe it was trained by where that is known."""

    model: ModelConfig
    adapter: Path | None = None
    checkpoint: Path | None = None
    recipe: Recipe | None = None


def resolve_reference(name: str) -> Reference:
    """Find out what `name` is, without loading weights. Raises UserError when it is nothing we know."""
    path = Path(name).expanduser()
    if (path / MARKER).is_file():
        recipe = _read_recipe(path.parent.parent)
        return Reference(recipe.model, checkpoint=path, recipe=recipe)
    if (path / "recipe.yaml").is_file():
        return _resolve_run(path)
    _refuse_unknown(name, path)
    base, adapter = split_adapter(str(path) if path.exists() else name)
    return Reference(ModelConfig(path=base), adapter=None if adapter is None else Path(adapter))


def _refuse_unknown(name: str, path: Path) -> None:
    """A misspelt folder looks like a hub id; find out here rather than after many attempts to reach the hub."""
    if path.is_dir():
        if path.parent.name == "checkpoints":
            raise UserError(f"--model: {name} is no complete checkpoint (no {MARKER} in it)")
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"--model: {name} is no run, checkpoint, adapter or Hugging Face folder")
    elif path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model: {name}: the only files that hold a model here are GGUF files (*.gguf)")
    elif not name.startswith(PACKAGE_PREFIX):
        in_a_folder = path.parent != Path() and path.parent.is_dir()
        if in_a_folder or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
            raise UserError(f"--model: {name}: no such file or folder, and no hub id")


def _resolve_run(run_dir: Path) -> Reference:
    recipe = _read_recipe(run_dir)
    if (run_dir / "finished.json").is_file():
        model_dir = run_dir / "model"
        if recipe.adapter.kind == "none":
            return Reference(recipe.model.model_copy(update={"path": str(model_dir), "revision": None}), recipe=recipe)
        return Reference(recipe.model, adapter=model_dir, recipe=recipe)
    for checkpoint in complete_checkpoints(run_dir):
        return Reference(recipe.model, checkpoint=checkpoint, recipe=recipe)
    raise UserError(f"{run_dir}: the run is not finished and has no complete checkpoint yet")


def _read_recipe(run_dir: Path) -> Recipe:
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: not a run folder (no recipe.yaml in it)")
    return parse_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))


def fingerprint(reference: Reference) -> list[str]:
    """What tells these weights from others without reading them: names, sizes and times of their files."""
    found = [reference.model.path, str(reference.model.revision), str(reference.model.dtype)]
    if reference.checkpoint is not None:
        return [*found, (reference.checkpoint / MARKER).read_text(encoding="utf-8")]
    for place in (reference.adapter, Path(reference.model.path)):
        if place is None or not place.exists():
            continue
        files = [place] if place.is_file() else sorted(place.glob("*"))
        weights = [file for file in files if file.suffix in WEIGHT_FILES]
        found += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in weights]
    return found


def load_reference(reference: Reference, device: torch.device | str, ds_config: dict[str, Any] | None = None) -> Any:
    """The model of a reference in eval mode: whole on this device, or with a `ds_config` of ZeRO stage 3 partitioned.

    All ranks call it together when it is partitioned; none of them then holds the model.
    """
    quantization = None if reference.recipe is None else reference.recipe.quantization
    model = load_model(reference.model, AdapterConfig(), ds_config or {}, device=device, quantization=quantization)
    if reference.adapter is not None:
        adapter = AdapterConfig(kind="lora") if reference.recipe is None else reference.recipe.adapter
        model = apply_adapter(model, adapter, str(reference.adapter), seed=0)
    if reference.checkpoint is not None:
        model = _with_checkpoint(model, reference)
    if ds_config and zero_stage(ds_config) == 3:
        partition_rest(model, ds_config)
        return model.eval()
    return model.to(device).eval()


def _with_checkpoint(model: Any, reference: Reference) -> Any:
    """Put the weights of a checkpoint into the model."""
    recipe = reference.recipe
    assert recipe is not None and reference.checkpoint is not None
    if recipe.adapter.kind == "lora":
        model = apply_adapter(model, recipe.adapter, recipe.model.adapter_path, recipe.train.seed)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with open_weights(reference.checkpoint) as weights:
        if missing := sorted(wanted.keys() - weights.shapes):
            raise UserError(f"{reference.checkpoint}: lacks {missing[0]} and {len(missing) - 1} more parameters")
        for name, parameter in wanted.items():
            assign(parameter, lambda name=name: weights.whole(name))
    return model


def export_run(run: Path, out: Path, merge: bool) -> None:
    """`ssgen export`: the trained model as a Hugging Face folder; with `merge`, the adapter folded into its base.

    Of an unfinished run it is the newest complete checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not empty")
    if not (run / "recipe.yaml").is_file() and not (run / MARKER).is_file():
        raise UserError(f"{run}: neither a run folder (no recipe.yaml in it) nor a checkpoint")
    reference = resolve_reference(str(run))
    assert reference.recipe is not None
    if merge and reference.recipe.adapter.kind == "none":
        raise UserError(f"--merge: {run} trained the whole model, there is no adapter to merge; leave --merge out")
    try:
        print(f"{out}: {_export(reference, run, out, merge)}")
    except OSError as error:
        raise UserError(f"--out: {error}") from error


def _export(reference: Reference, run: Path, out: Path, merge: bool) -> str:
    """What was done. Raises OSError."""
    if merge:
        return f"merged; its logits differ from base + adapter by at most {_merge(reference, out):.1e}"
    if reference.checkpoint is None:
        with whole_folder(out) as folder:
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        return f"copied from {run / 'model'}"
    _save_checkpoint_model(reference, out)
    return f"made from {reference.checkpoint}"


def _merge(reference: Reference, out: Path) -> float:
    assert reference.recipe is not None
    dtype = resolve_dtype(reference.model, "cuda" if torch.cuda.is_available() else "cpu")
    quantization = reference.recipe.quantization
    if reference.adapter is not None:
        return merge_adapter(reference.model, str(reference.adapter), out, dtype, quantization)
    with tempfile.TemporaryDirectory() as folder:
        _save_checkpoint_model(reference, Path(folder))
        return merge_adapter(reference.model, folder, out, dtype, quantization)


def _save_checkpoint_model(reference: Reference, out: Path) -> None:
    base = resolve_model_path(reference.model.path, reference.model.revision).path
    save_model(load_reference(reference, "cpu"), load_tokenizer(reference.model), out, base, is_main=True)

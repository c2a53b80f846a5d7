"""What `--model` may be: a run folder, a checkpoint, an adapter folder, a Hugging Face folder or id, a GGUF file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.paths import HUB_ID, PACKAGE_PREFIX
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapter_checks import adapter_problems
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.gather import assign
from ssgen_ds.modeling.model_folder import Notes, read_notes
from ssgen_ds.modeling.model_path import find_local_model, split_adapter
from ssgen_ds.recipe.deepspeed import zero_stage
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig, QuantizationConfig, Recipe
from ssgen_ds.run.finished_model import model_problems
from ssgen_ds.run.folder import is_finished, read_recipe
from ssgen_ds.run.layout import CHECKPOINTS_FOLDER, MARKER, MODEL_FOLDER, RECIPE_FILE, TEMPLATE_FILE

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

log = logging.getLogger(__name__)

WEIGHT_FILES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class ModelSource:
    """A model to load, and the recipe it was trained by where that is known, or what its folder says of it."""

    model: ModelConfig
    adapter: Path | None = None
    checkpoint: Path | None = None
    recipe: Recipe | None = None
    notes: Notes | None = None

    @property
    def quantization(self) -> QuantizationConfig | None:
        """Of the base, as it was in training; None where that is not known."""
        if self.recipe is not None:
            return self.recipe.quantization
        return None if self.notes is None else self.notes.quantization


def resolve_model_source(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Find out what `name` is, without loading weights. Raises UserError when it is nothing we know.

    A folder may come from anywhere: whether code that comes with its model runs is for `trust_remote_code` alone to
    say, and nothing in the folder counts.
    """
    path = Path(name).expanduser()
    if (path / MARKER).is_file():
        recipe = _read_recipe(path.resolve().parent.parent, trust_remote_code)
        return ModelSource(recipe.model, checkpoint=path, recipe=recipe)
    if (path / RECIPE_FILE).is_file():
        return _resolve_run(path, trust_remote_code)
    _refuse_unknown(name, path)
    base, adapter = split_adapter(str(path) if path.exists() else name)
    notes = read_notes(str(path) if path.exists() else name)
    model = ModelConfig(path=base, trust_remote_code=trust_remote_code)
    return ModelSource(model, adapter=None if adapter is None else Path(adapter), notes=notes)


def check_model_name(name: str) -> None:
    """What can be told of a model's name without torch and without the hub. Raises UserError.

    Of a run or a checkpoint only `resolve_model_source` knows more.
    """
    path = Path(name).expanduser()
    if (path / MARKER).is_file() or (path / RECIPE_FILE).is_file():
        return
    _refuse_unknown(name, path)
    base, adapter = split_adapter(str(path) if path.exists() else name)
    if adapter is not None or name.startswith(PACKAGE_PREFIX):
        find_local_model(base)


def _refuse_unknown(name: str, path: Path) -> None:
    """A misspelt folder looks like a hub id; find out here rather than after many attempts to reach the hub."""
    if path.is_dir():
        if path.parent.name == CHECKPOINTS_FOLDER:
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


def _resolve_run(run_dir: Path, trust_remote_code: bool) -> ModelSource:
    recipe = _read_recipe(run_dir, trust_remote_code)
    lost: list[str] = []
    if is_finished(run_dir) and not (lost := model_problems(run_dir)):
        model_dir = run_dir / MODEL_FOLDER
        if recipe.adapter.kind == "none":
            return ModelSource(
                recipe.model.model_copy(update={"path": str(model_dir), "revision": None}), recipe=recipe
            )
        return ModelSource(recipe.model, adapter=model_dir, recipe=recipe)
    from ssgen_ds.checkpoint.save import complete_checkpoints

    for checkpoint in complete_checkpoints(run_dir):
        if lost:
            log.warning("%s: its model is not all there (%s): %s is used", run_dir, "; ".join(lost), checkpoint)
        return ModelSource(recipe.model, checkpoint=checkpoint, recipe=recipe)
    if lost:
        raise UserError.from_list(f"{run_dir}: its model is not all there, and it has no complete checkpoint", lost)
    raise UserError(f"{run_dir}: the run is not finished and has no complete checkpoint yet")


def _read_recipe(run_dir: Path, trust_remote_code: bool) -> Recipe:
    file = run_dir / RECIPE_FILE
    if not file.is_file():
        raise UserError(f"{run_dir}: not a run folder (no recipe.yaml in it)")
    recipe = read_recipe(file)
    model = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
    data = recipe.data.model_copy(update={"chat_template": _own_template(run_dir, recipe.data.chat_template)})
    return recipe.model_copy(update={"model": model, "data": data})


def _own_template(run_dir: Path, stored: str | None) -> str | None:
    """The run's chat template: its copy; in a run of an earlier version, the file below the working directory.

    No folder may have any other file of this machine read and shown.
    """
    if stored is None:
        return None
    own = run_dir / TEMPLATE_FILE
    if own.is_file() and own.resolve().is_relative_to(run_dir.resolve()):
        return str(own)
    if Path(stored).is_absolute() or ".." in Path(stored).parts or stored.startswith("~"):
        raise UserError(
            f"{run_dir}: its recipe names a chat template that is not in it: {stored}. If you know that the run was "
            f"trained with it, copy it to {own}"
        )
    return stored


def fingerprint(model_source: ModelSource) -> list[str]:
    """What tells these weights from others without reading them: names, sizes and times of their files."""
    found = [model_source.model.path, str(model_source.model.revision), str(model_source.model.dtype)]
    if model_source.checkpoint is not None:
        return [*found, (model_source.checkpoint / MARKER).read_bytes().hex()]
    for place in (model_source.adapter, Path(model_source.model.path)):
        if place is None or not place.exists():
            continue
        files = [place] if place.is_file() else sorted(place.glob("*"))
        weights = [file for file in files if file.suffix in WEIGHT_FILES]
        found += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in weights]
    return found


def _refuse_adapter(model_source: ModelSource, ds_config: dict[str, Any] | None) -> None:
    """Some kinds of adapters cannot be put on a partitioned model. Raises UserError before weights load."""
    start = (
        None
        if model_source.checkpoint is None or model_source.recipe is None
        else model_source.recipe.model.adapter_path
    )
    path = start if model_source.adapter is None else str(model_source.adapter)
    if not ds_config or zero_stage(ds_config) != 3:
        return
    if problems := adapter_problems(path, 3):
        raise UserError("\n".join(problems))


def load_model_source(
    model_source: ModelSource,
    device: torch.device | str,
    ds_config: dict[str, Any] | None = None,
    control: dist.ProcessGroup | None = None,
) -> Any:
    """The model of a source in eval mode: whole on this device, or with a `ds_config` of ZeRO stage 3 partitioned.

    All ranks call it together when it is partitioned; none of them then holds the model.
    """
    from ssgen_ds.modeling.load import load_model

    _refuse_adapter(model_source, ds_config)
    model = load_model(
        model_source.model, AdapterConfig(), ds_config or {},
        device=device, quantization=model_source.quantization, control=control,
    )  # fmt: skip
    if model_source.adapter is not None:
        adapter = AdapterConfig(kind="lora") if model_source.recipe is None else model_source.recipe.adapter
        model = apply_adapter(model, adapter, str(model_source.adapter), seed=0)
    if model_source.checkpoint is not None:
        model = _with_checkpoint(model, model_source)
    if ds_config and zero_stage(ds_config) == 3:
        from ssgen_ds.modeling.zero3 import partition_rest

        partition_rest(model, ds_config)
        return model.eval()
    return model.to(device).eval()


def _with_checkpoint(model: Any, model_source: ModelSource) -> Any:
    """Put the weights of a checkpoint into the model."""
    from ssgen_ds.checkpoint.save import open_weights

    recipe = model_source.recipe
    assert recipe is not None and model_source.checkpoint is not None
    if recipe.adapter.kind == "lora":
        model = apply_adapter(model, recipe.adapter, recipe.model.adapter_path, recipe.train.seed)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with open_weights(model_source.checkpoint) as weights:
        if missing := sorted(wanted.keys() - weights.shapes):
            raise UserError(f"{model_source.checkpoint}: lacks {missing[0]} and {len(missing) - 1} more parameters")
        for name, parameter in wanted.items():
            assign(parameter, partial(weights.whole, name))
    return model

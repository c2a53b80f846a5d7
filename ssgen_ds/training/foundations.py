"""What is known before any weight is loaded: a run folder, a DeepSpeed configuration, tokens; or all that is wrong."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.checkpoint import save as checkpoint
from ssgen_ds.checkpoint.choose import check_resumable, choose_checkpoint, find_checkpoints
from ssgen_ds.checkpoint.save import TrainState
from ssgen_ds.data.datasets import Datasets, build_datasets, check_first_rows
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.distributed.host_memory import host_bytes
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import Problems, UserError
from ssgen_ds.metrics.scorer import Scorer
from ssgen_ds.modeling.adapter_checks import adapter_problems, target_problems
from ssgen_ds.modeling.families import check_trainable
from ssgen_ds.modeling.load import OpenedModel, open_model, resolve_dtype
from ssgen_ds.modeling.positions import context_problems
from ssgen_ds.modeling.quantization import quantization_problems, slow_quantization
from ssgen_ds.plan.run import offload_problems
from ssgen_ds.recipe.deepspeed import (
    build_ds_config,
    offloads_optimizer,
    offloads_parameters,
    zero_stage,
)
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.recipe.user_paths import cache_root
from ssgen_ds.run import folder as run_folder
from ssgen_ds.run.finished_model import model_problems
from ssgen_ds.run.layout import RECIPE_FILE
from ssgen_ds.run.logbook import missing_packages
from ssgen_ds.training.device_checks import DeviceFacts, device_facts, device_problems
from ssgen_ds.training.schedules import check_length

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Tokens in every form."""

    tokenizer: Any
    chat: ChatFormat
    datasets: Datasets
    vocab_size: int  # width of the logits; the tokenizer may know fewer


@dataclass
class Foundations:
    """What is known before any weight is loaded."""

    recipe: Recipe
    checkpoint: Path | None
    state: TrainState  # at which training starts: the checkpoint's, or step 0
    ds_config: dict[str, Any]
    inputs: Inputs
    total_steps: int


def lay_foundations(recipe: Recipe, world: World) -> Foundations | None:
    """Everything that is known before weights load; None when the run in output_dir is already finished.

    Rank 0 asks all questions and fills the caches, then the other ranks ask them. Raises UserError on all ranks, with
    every problem of the rank that has some.
    """
    has_ended, problems_of_run = world.on_main(lambda: _look_at_run(recipe))
    if has_ended:
        return None
    dtype = str(resolve_dtype(recipe.model, world.device)).removeprefix("torch.")
    free, devices = host_bytes(world), world.gather(device_facts(world.device))
    ds_config, inputs = world.main_first(lambda: _ask_everything(recipe, world, dtype, free, devices, problems_of_run))
    if world.is_main:
        _warn(recipe, inputs.datasets.summary, world)
    fingerprints = inputs.datasets.fingerprint, inputs.chat.fingerprint()
    state = TrainState(0, 0, *fingerprints, world.size, zero_stage(ds_config), run_folder.package_versions())
    total_steps = recipe.train.max_steps or inputs.datasets.steps_of(recipe.train.epochs or 0)
    checkpoint_path, state = _starting_point(recipe, state, total_steps, world)
    return Foundations(recipe, checkpoint_path, state, ds_config, inputs, total_steps)


def _look_at_run(recipe: Recipe) -> tuple[bool, list[str]]:
    """Whether the run has ended, and why the recipe may not be trained in its output_dir."""
    problems = Problems()
    is_over = problems.ask(lambda: open_and_see_whether_ended(recipe))
    problems.ask(lambda: find_checkpoints(Path(recipe.output_dir), recipe.resume))
    return bool(is_over), problems.found


def open_and_see_whether_ended(recipe: Recipe) -> bool:
    """`has_ended` of a run that this recipe may train. Raises UserError where the folder is another's."""
    run_folder.open_run(recipe)
    return has_ended(recipe)


def _ask_everything(
    recipe: Recipe, world: World, dtype: str, free: float, devices: list[DeviceFacts], known: list[str]
) -> tuple[dict[str, Any], Inputs]:
    """The DeepSpeed configuration and the inputs, after every check that needs no weights.

    A check that needs what an earlier one was refused is left out; all others are made.

    Args:
        free: bytes of the host's memory for this rank.
        devices: of all ranks.
        known: problems that were found before.

    Raises:
        UserError: with all problems.
    """
    problems = Problems(known)
    ds_config = problems.ask(lambda: build_ds_config(recipe, world.size, dtype))
    stage = 0 if ds_config is None else zero_stage(ds_config)
    problems.collect(lambda: adapter_problems(recipe.model.adapter_path, stage))
    problems.ask(lambda: Scorer(recipe.eval.metrics, "eval.metrics"))  # one of the user's own may not be there
    problems.add(missing_packages(recipe.log))
    problems.collect(lambda: quantization_problems(recipe))
    opened = problems.ask(lambda: open_model(recipe.model, recipe.data))
    if opened is not None:
        problems.collect(lambda: target_problems(recipe, stage))
        if ds_config is not None and (offloads_optimizer(ds_config) or offloads_parameters(ds_config)):
            problems.collect(lambda: offload_problems(recipe, dtype, world.size, free))
        if ds_config is not None:
            problems.collect(lambda: device_problems(recipe, dtype, devices))
    inputs = None if opened is None else _read_inputs(recipe, opened, problems, world)
    problems.refuse()
    assert ds_config is not None and inputs is not None
    return ds_config, inputs


def _warn(recipe: Recipe, summary: dict[str, Any], world: World) -> None:
    if slow := slow_quantization(recipe, world.device.type):
        log.warning(slow)
    for key, counts in (("data.train", summary), ("data.eval", summary.get("eval", {}))):
        if columns := counts.get("unused_columns"):
            log.warning("%s: columns that nothing is taken from: %s", key, ", ".join(columns))


def has_ended(recipe: Recipe) -> bool:
    """Whether nothing is left to do, not even to write the model that a finished run has lost.

    Raises UserError where the run is finished, something is left to do, and no checkpoint to do it from.
    """
    run_dir = Path(recipe.output_dir)
    if not run_folder.is_finished(run_dir):
        return False
    is_done, lost = run_folder.is_done(recipe), model_problems(run_dir)
    if is_done and not lost:
        return True
    if recipe.resume == "auto" and not checkpoint.candidates(run_dir):
        what = "its model is not all there" if is_done else "the recipe asks for more of it"
        raise UserError.from_list(
            f"{run_dir}: this run is finished, {what}, and no checkpoint is left to go on from; restore the files, or "
            "train again in another output_dir",
            lost,
        )
    if is_done:
        what = f"{run_dir}: this run is finished, but its model is not all there ({'; '.join(lost)})"
        log.warning("%s: it is written once more from the newest checkpoint", what)
    return False


def _starting_point(
    recipe: Recipe, state: TrainState, total_steps: int, world: World
) -> tuple[Path | None, TrainState]:
    """The checkpoint to go on from and its state, as rank 0 sees them; None and `state` to start at step 0."""
    run_dir = Path(recipe.output_dir)
    found = world.together(lambda: find_checkpoints(run_dir, recipe.resume) if world.is_main else [])
    path = choose_checkpoint(found, run_dir, world)
    if path is None:
        return None, state

    def check() -> TrainState:
        what = f"resume: {path} was trained by another recipe"
        run_folder.refuse_changes(path / RECIPE_FILE, recipe, what)
        saved = check_resumable(path, checkpoint.read_state(path), state, log.warning)
        before = run_folder.read_recipe(path / RECIPE_FILE)
        check_length(path, saved.step, before, recipe, total_steps, log.warning)
        return saved

    return path, world.on_main(check)


def prepare_inputs(recipe: Recipe, world: World) -> Inputs:
    """Tokenizer, model configuration and data, checked against each other, the same on every rank.

    Raises UserError on all ranks with all problems.
    """

    def read() -> Inputs:
        problems = Problems()
        problems.collect(lambda: quantization_problems(recipe))
        opened = problems.ask(lambda: open_model(recipe.model, recipe.data))
        inputs = None if opened is None else _read_inputs(recipe, opened, problems, world)
        problems.refuse()
        assert inputs is not None
        return inputs

    return world.main_first(read)


def _read_inputs(recipe: Recipe, opened: OpenedModel, problems: Problems, world: World) -> Inputs | None:
    """What is trained on; None where there is a problem. Data are read in full when nothing else is wrong.

    Tokenising may take an hour, and a user who has to start again anyway does not wait for it: the first rows tell most
    of what can be wrong.
    """
    problems.ask(lambda: check_trainable(opened.config, recipe))
    problems.collect(lambda: context_problems(recipe, opened.chat, opened.text_config))
    if problems.found:
        problems.ask(lambda: check_first_rows(recipe.data, opened.chat))
        return None
    tick = world.phases.tick
    datasets = problems.ask(lambda: build_datasets(recipe, opened.chat, cache_root() / "data", tick))
    return None if datasets is None else Inputs(opened.tokenizer, opened.chat, datasets, opened.vocab_size)

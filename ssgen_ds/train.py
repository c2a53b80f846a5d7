"""Train by a recipe, on one process or many.

ssgen train RECIPE [key=value ...]
deepspeed --num_gpus 8 --module ssgen_ds.train RECIPE [key=value ...]
torchrun --nproc-per-node 8 -m ssgen_ds.train RECIPE [key=value ...]
srun python -m ssgen_ds.train RECIPE [key=value ...]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ssgen_ds.distributed.launch import before_meeting, guarded, split_arguments
from ssgen_ds.distributed.signals import StopFlag, shielded_children, stop_on_signals
from ssgen_ds.errors import StopRequested, UserError
from ssgen_ds.run.layout import MODEL_FOLDER, RECIPE_FILE

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World
    from ssgen_ds.recipe.schema import Recipe
    from ssgen_ds.training.foundations import Inputs
    from ssgen_ds.training.trainer import Trainer


def train(recipe_file: Path, overrides: list[str]) -> None:
    """Join the ranks and run the recipe to its end, or to a requested stop.

    What is slow to import comes after the signal handlers: a stop is asked for at any time.
    """
    with stop_on_signals() as stop:
        from ssgen_ds.modeling.preflight import recipe_to_train

        _train(before_meeting(lambda: recipe_to_train(recipe_file, overrides)), stop)


def _train(recipe: Recipe, stop: StopFlag) -> None:
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.run.lock import locked

    with process_group(recipe.recovery, stop) as world:
        if world.broadcast(world.together(lambda: world.is_main and _is_done_for_good(recipe))):
            if world.is_main:
                say_finished(recipe)
            return
        with locked(Path(recipe.output_dir), world):
            fit_and_export(recipe, world)


def _is_done_for_good(recipe: Recipe) -> bool:
    """Whether the run is finished and lies where nothing can be written, not even its lock: results that are shared.

    Raises UserError where the recipe is another one.
    """
    from ssgen_ds.run.folder import is_finished
    from ssgen_ds.training.foundations import open_and_see_whether_ended

    run_dir = Path(recipe.output_dir)
    if not is_finished(run_dir) or os.access(run_dir, os.W_OK):
        return False
    return open_and_see_whether_ended(recipe)


def fit_and_export(recipe: Recipe, world: World) -> None:
    """Build, fit, export. Continues a run that was interrupted; says so when it is already finished."""
    import psutil

    from ssgen_ds.distributed.compile_lock import without_stale_locks
    from ssgen_ds.run.attempts import attempt
    from ssgen_ds.training.build import build_trainer
    from ssgen_ds.training.foundations import lay_foundations

    with attempt(recipe, world) as reach:
        with world.phase("prepare"), shielded_children():
            foundations = lay_foundations(recipe, world)
        if foundations is None:
            reach(None)
            if world.is_main:
                say_finished(recipe)
            return
        reach(foundations.state.step)
        _stop_if_asked(foundations.state.step, world)
        with world.phase("load"), shielded_children(), without_stale_locks():
            trainer = build_trainer(foundations, world)
        _stop_if_asked(foundations.state.step, world)
        if foundations.checkpoint is not None:
            seconds = time.time() - psutil.Process().create_time()
            trainer.progress.message(f"resumed at step {foundations.state.step}, {seconds:.1f} s after the start")
        try:
            with trainer.progress:
                trainer.fit()
        finally:
            if trainer.logbook is not None:
                trainer.logbook.close()
        with world.phase("export", trainer.total_steps):
            export(recipe, foundations.inputs, trainer, world)


def say_finished(recipe: Recipe) -> None:
    """Of a run that is done, and what a start with another recipe does not do by itself."""
    from ssgen_ds.run.folder import read_recipe

    run_dir = Path(recipe.output_dir)
    before = read_recipe(run_dir / RECIPE_FILE)
    print(f"{run_dir}: this run is finished; the model is in {run_dir / 'model'}")
    if recipe.train.length != before.train.length:
        print(f"train.max_steps and train.epochs ask for no more than the {before.train.length} that it has trained")
    if (before.data.eval, before.eval) != (recipe.data.eval, recipe.eval):
        data = recipe.data.eval[0].path if recipe.data.eval else "FILE"
        print(f"nothing is left to evaluate while training: ssgen evaluate --model {run_dir} --data {data}")


def _stop_if_asked(step: int, world: World) -> None:
    """Before anything was trained. Raises StopRequested on all ranks when one was asked to stop."""
    if world.any(world.stop.is_set):
        raise StopRequested(f"stopped on request before anything was trained after step {step}: start again to go on")


def export(recipe: Recipe, inputs: Inputs, trainer: Trainer, world: World) -> None:
    """The trained model and the report; then the run is finished.

    Raises UserError on all ranks when one of them cannot be written; the last checkpoint has all that was trained.
    """
    from ssgen_ds.modeling.export import state_to_save, write_model
    from ssgen_ds.modeling.model_folder import trained_as
    from ssgen_ds.modeling.model_path import resolve_model_path
    from ssgen_ds.report.page import write_report
    from ssgen_ds.run.folder import mark_finished

    run_dir = Path(recipe.output_dir)
    base = resolve_model_path(recipe.model.path, recipe.model.revision).path
    state = state_to_save(trainer.engine.module)

    def write() -> None:
        world.phases.tick("model")
        if state is None:
            return
        trained = trained_as(recipe, inputs.chat)
        write_model(trainer.engine.module, state, inputs.tokenizer, run_dir / MODEL_FOLDER, base, trained)
        saved = trainer.saver.cost
        cost = {} if saved is None else {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": saved.nbytes}
        mark_finished(run_dir, trainer.state.step, **cost)

    try:
        world.together(write)
    except UserError as error:
        kept = f"step {trainer.state.step}, the last, is in the newest checkpoint: start again to write the model"
        raise UserError(f"the trained model was not written; {kept}\n{error}") from None
    if world.is_main:
        print(f"model:  {run_dir / 'model'}")
    report = world.together(lambda: write_report(run_dir) if world.is_main else None)
    if world.is_main:
        print(f"report: {report}")
    trainer.engine.destroy()  # its hooks would keep the model in memory
    world.barrier()


def main(arguments: list[str]) -> None:
    positional, overrides = split_arguments(arguments, usage="RECIPE [key=value ...]", expected=1)
    train(Path(positional[0]), overrides)


if __name__ == "__main__":
    guarded(main, sys.argv[1:])

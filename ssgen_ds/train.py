"""Train by a recipe, on one process or many.

ssgen train RECIPE [key=value ...]
deepspeed --num_gpus 8 --module ssgen_ds.train RECIPE [key=value ...]
torchrun --nproc-per-node 8 -m ssgen_ds.train RECIPE [key=value ...]
srun python -m ssgen_ds.train RECIPE [key=value ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import StopRequested, UserError
from ssgen_ds.launch import guarded, is_alone, split_arguments
from ssgen_ds.signals import StopFlag, shielded_children, stop_on_signals

if TYPE_CHECKING:
    from ssgen_ds.config import Recipe
    from ssgen_ds.distributed import World
    from ssgen_ds.trainer import Trainer


def train(recipe_file: Path, overrides: list[str]) -> None:
    """Join the ranks and run the recipe to its end, or to a requested stop.

    What is slow to import comes after the signal handlers: a stop is asked for at any time.
    """
    with stop_on_signals() as stop:
        from ssgen_ds.config import load_recipe

        try:
            recipe = load_recipe(recipe_file, overrides)
        except UserError as problem:
            if is_alone():
                raise
            from ssgen_ds.distributed import refuse_together

            refuse_together(problem)
        _train(recipe, stop)


def _train(recipe: Recipe, stop: StopFlag) -> None:
    from ssgen_ds.distributed import process_group
    from ssgen_ds.run_lock import locked

    with process_group(recipe.recovery, stop) as world, locked(Path(recipe.output_dir), world):
        fit_and_export(recipe, world)


def fit_and_export(recipe: Recipe, world: World) -> None:
    """Build, fit, export. Continues a run that was interrupted; says so when it is already finished."""
    import psutil

    from ssgen_ds.attempts import attempt
    from ssgen_ds.build import build_trainer, lay_foundations
    from ssgen_ds.compile_lock import without_stale_locks

    with attempt(recipe, world) as reach:
        with world.phase("prepare"), shielded_children():
            foundations = lay_foundations(recipe, world)
        if foundations is None:
            reach(None)
            if world.is_main:
                print(f"{recipe.output_dir}: this run is finished; the model is in {Path(recipe.output_dir) / 'model'}")
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
            export(recipe, foundations.inputs.tokenizer, trainer, world)


def _stop_if_asked(step: int, world: World) -> None:
    """Before anything was trained. Raises StopRequested on all ranks when one was asked to stop."""
    if world.any(world.stop.is_set):
        raise StopRequested(f"stopped on request before anything was trained after step {step}: start again to go on")


def export(recipe: Recipe, tokenizer: Any, trainer: Trainer, world: World) -> None:
    """The trained model and the report; then the run is finished.

    Raises UserError on all ranks when one of them cannot be written; the last checkpoint has all that was trained.
    """
    from ssgen_ds.evaluate.report import write_report
    from ssgen_ds.modeling.export import state_to_save, write_model
    from ssgen_ds.modeling.load import resolve_model_path
    from ssgen_ds.run_folder import mark_finished

    run_dir = Path(recipe.output_dir)
    base = resolve_model_path(recipe.model.path, recipe.model.revision).path
    state = state_to_save(trainer.engine.module)

    def write() -> None:
        world.phases.tick("model")
        if state is None:
            return
        write_model(trainer.engine.module, state, tokenizer, run_dir / "model", base)
        saved = trainer.saved
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

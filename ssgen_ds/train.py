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

import psutil

from ssgen_ds.attempts import attempt
from ssgen_ds.config import Recipe, load_recipe
from ssgen_ds.launch import guarded, split_arguments
from ssgen_ds.run_lock import locked

if TYPE_CHECKING:
    from ssgen_ds.distributed import World
    from ssgen_ds.trainer import Trainer


def train(recipe: Recipe) -> None:
    """Join the ranks and run the recipe to its end, or to a requested stop."""
    from ssgen_ds.distributed import process_group
    from ssgen_ds.signals import stop_on_signals

    with (
        stop_on_signals() as stop,
        process_group(recipe.recovery, stop) as world,
        locked(Path(recipe.output_dir), world),
    ):
        fit_and_export(recipe, world)


def fit_and_export(recipe: Recipe, world: World) -> None:
    """Build, fit, export. Continues a run that was interrupted; says so when it is already finished."""
    from ssgen_ds.build import build_trainer, lay_foundations

    with world.phase("prepare"):
        foundations = lay_foundations(recipe, world)
    if foundations is None:
        if world.is_main:
            print(f"{recipe.output_dir}: this run is finished; the model is in {Path(recipe.output_dir) / 'model'}")
        return
    with attempt(foundations.state.step, recipe, world):
        with world.phase("load"):
            trainer = build_trainer(foundations, world)
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


def export(recipe: Recipe, tokenizer: Any, trainer: Trainer, world: World) -> None:
    """The trained model and the report; then the run is finished."""
    from ssgen_ds.evaluate.report import write_report
    from ssgen_ds.modeling.export import save_model
    from ssgen_ds.modeling.load import resolve_model_path
    from ssgen_ds.run_folder import mark_finished

    run_dir = Path(recipe.output_dir)
    base = resolve_model_path(recipe.model.path, recipe.model.revision).path
    save_model(trainer.engine.module, tokenizer, run_dir / "model", base, is_main=world.is_main)
    if world.is_main:
        saved = trainer.saved
        cost = {} if saved is None else {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": saved.nbytes}
        mark_finished(run_dir, trainer.state.step, **cost)
        print(f"model:  {run_dir / 'model'}\nreport: {write_report(run_dir)}")
    trainer.engine.destroy()  # its hooks would keep the model in memory
    world.barrier()


def main(arguments: list[str]) -> None:
    positional, overrides = split_arguments(arguments, usage="RECIPE [key=value ...]", expected=1)
    train(load_recipe(positional[0], overrides))


if __name__ == "__main__":
    guarded(main, sys.argv[1:])

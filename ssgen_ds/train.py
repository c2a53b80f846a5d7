"""Train by a recipe, on one process or many.

ssgen train RECIPE [key=value ...]
deepspeed --num_gpus 8 --module ssgen_ds.train RECIPE [key=value ...]
torchrun --nproc-per-node 8 -m ssgen_ds.train RECIPE [key=value ...]
srun python -m ssgen_ds.train RECIPE [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ssgen_ds.config import Recipe, load_recipe
from ssgen_ds.launch import guarded, split_arguments

if TYPE_CHECKING:
    from ssgen_ds.distributed import World
    from ssgen_ds.signals import StopFlag


def train(recipe: Recipe) -> None:
    """Join the ranks and run the recipe to its end, or to a requested stop."""
    from ssgen_ds.distributed import process_group
    from ssgen_ds.signals import stop_on_signals

    with process_group() as world, stop_on_signals() as stop:
        fit_and_export(recipe, world, stop)


def fit_and_export(recipe: Recipe, world: World, stop: StopFlag) -> None:
    """Build, fit, export. Continues a run that was interrupted; says so when it is already finished."""
    from ssgen_ds.build import build_trainer, lay_foundations
    from ssgen_ds.evaluate.report import write_report
    from ssgen_ds.modeling.export import save_model
    from ssgen_ds.modeling.load import resolve_model_path
    from ssgen_ds.run_folder import mark_finished

    run_dir = Path(recipe.output_dir)
    foundations = lay_foundations(recipe, world)
    if foundations is None:
        if world.is_main:
            print(f"{run_dir}: this run is finished; the model is in {run_dir / 'model'}")
        return
    trainer = build_trainer(foundations, world, stop)
    try:
        with trainer.progress:
            trainer.fit()
    finally:
        if trainer.logbook is not None:
            trainer.logbook.close()
    base = resolve_model_path(recipe.model.path, recipe.model.revision).path
    save_model(trainer.engine.module, foundations.inputs.tokenizer, run_dir / "model", base, is_main=world.is_main)
    if world.is_main:
        mark_finished(run_dir, trainer.state.step)
        print(f"model:  {run_dir / 'model'}\nreport: {write_report(run_dir)}")
    trainer.engine.destroy()  # its hooks would keep the model in memory
    world.barrier()


def main(arguments: list[str]) -> None:
    positional, overrides = split_arguments(arguments, usage="RECIPE [key=value ...]", expected=1)
    train(load_recipe(positional[0], overrides))


if __name__ == "__main__":
    guarded(main, sys.argv[1:])

"""What can be told without torch, before the ranks meet: files that must exist, packages, a folder to write in.

A user who has mistyped a path hears of it at once, together with everything else that is wrong, and not after the
libraries have been imported.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ssgen_ds.data.paths import resolve_path
from ssgen_ds.distributed.launch import is_first_rank, launched_ranks
from ssgen_ds.errors import Problems, UserError
from ssgen_ds.modeling.adapter_checks import adapter_problems
from ssgen_ds.modeling.model_path import find_local_model
from ssgen_ds.modeling.quantization import missing_bitsandbytes
from ssgen_ds.recipe.deepspeed import certain_problems, find_template
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import DataConfig, Recipe
from ssgen_ds.run.files import check_writable
from ssgen_ds.run.layout import FINISHED_FILE
from ssgen_ds.run.lock import cannot_write
from ssgen_ds.run.logbook import missing_packages


def recipe_to_train(file: Path, overrides: list[str]) -> Recipe:
    """The recipe of a training that can start, as far as that is known without torch. Raises UserError.

    The run of a finished recipe may have outlived its data: nothing is asked for then.
    """
    recipe = load_recipe(file, overrides)
    if (Path(recipe.output_dir) / FINISHED_FILE).is_file():
        return recipe
    problems = Problems(certain_problems(recipe, launched_ranks()))
    problems.add(input_problems(recipe))
    problems.add(missing_packages(recipe.log))
    if is_first_rank():  # no other rank writes, and its node need not have the folder
        problems.ask(lambda: _check_output(Path(recipe.output_dir)))
    problems.refuse(str(file))
    return recipe


def recipe_to_read(file: Path, overrides: list[str]) -> Recipe:
    """The recipe where its model and its data are there, as far as that is known without torch. Raises UserError."""
    recipe = load_recipe(file, overrides)
    Problems(input_problems(recipe)).refuse(str(file))
    return recipe


def recipe_to_plan(file: Path, overrides: list[str]) -> Recipe:
    """The recipe where its model and DeepSpeed file are there; its data need not be. Raises UserError."""
    recipe = load_recipe(file, overrides)
    problems = Problems()
    problems.ask(lambda: find_template(recipe.deepspeed))
    problems.ask(lambda: find_local_model(recipe.model.path))
    problems.refuse(str(file))
    return recipe


def input_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the files and packages that model and data are read with."""
    problems = Problems()
    problems.ask(lambda: find_local_model(recipe.model.path))
    problems.collect(lambda: adapter_problems(recipe.model.adapter_path, zero_stage=0))
    problems.add(missing_bitsandbytes(recipe))
    problems.add(_missing_attention(recipe))
    problems.add(data_problems(recipe.data))
    return problems.found


def _missing_attention(recipe: Recipe) -> list[str]:
    """A sentence where the recipe asks for attention kernels that are not installed."""
    if recipe.model.attention != "flash_attention_2" or find_spec("flash_attn") is not None:
        return []
    return [
        "model.attention=flash_attention_2: the package flash-attn is missing; "
        "pip install flash-attn --no-build-isolation, or set model.attention=sdpa"
    ]


def data_problems(data: DataConfig) -> list[str]:
    """A sentence for each source that names no file, and for a chat template that cannot be read."""
    problems = Problems()
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for source in sources:
            problems.ask(partial(resolve_path, source.path, key))
    if data.chat_template is not None and not Path(data.chat_template).is_file():
        problems.add([f"data.chat_template: no such file: {data.chat_template}"])
    return problems.found


def _check_output(run_dir: Path) -> None:
    """Whether the run folder can be made or written in; the lock tries it once more. Raises UserError."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir: {run_dir} is a file")
    there = next(place for place in (run_dir, *run_dir.absolute().parents) if place.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if os.access(there, os.W_OK):
            return
        check_writable(there)
    except OSError as error:
        raise cannot_write(run_dir, error) from None

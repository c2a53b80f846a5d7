"""Runs on ranks, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import StopRequested, UserError
from ssgen_ds.modeling.gather import full_state_dict
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import free_request
from ssgen_ds.selfgen.generated import Generated
from ssgen_ds.selfgen.round_file import read_round
from ssgen_ds.train import fit_and_export
from ssgen_ds.training.build import build_trainer
from ssgen_ds.training.foundations import lay_foundations
from ssgen_ds.training.step import train_step
from ssgen_ds.training.trainer import Trainer
from tests.support.stopping import stopping
from tests.support.tiny_runs import tiny_recipe

STAGES = (0, 1, 2, 3)
# The tiny models lie below DeepSpeed's persistence threshold: with `ds_configs/zero3.json` each rank keeps all of them.
# In this file the threshold is 0.
PARTITIONED = "tests/support/zero3_all_partitioned.json"

TIMES = (
    *("step_seconds", "eval_seconds", "selfgen_seconds", "tokens_per_second", "peak_memory_bytes"),
    *("peak_generate_bytes", "peak_train_bytes", "peak_optimizer_bytes"),
    *("checkpoint_seconds", "checkpoint_bytes"),
)
_COSTS = (
    "calls token_forwards draws accepted_length first_draws guess_hits flips flip_rate flip_bound ties strategy block"
)
ROUND_COSTS = tuple(f"selfgen_{name}" for name in _COSTS.split())


# -- runs --------------------------------------------------------------------------------------------------------------


def zero(stage: int) -> str:
    """The shipped DeepSpeed configuration of this ZeRO stage."""
    return f"ds_configs/zero{stage}.json"


def fresh(folder: Path, name: str, world: World, **overrides: Any) -> Recipe:
    """A recipe with an output folder of its own, empty."""
    output = folder / f"ranks{world.size}" / name
    if world.is_main:
        shutil.rmtree(output, ignore_errors=True)
    world.barrier()
    return tiny_recipe(folder, output, adapter__rank=4, **overrides)


def trainer_for(recipe: Recipe, world: World) -> Trainer:
    foundations = lay_foundations(recipe, world)
    assert foundations is not None
    return build_trainer(foundations, world)


def trained(recipe: Recipe, world: World) -> Path:
    """Train it to its end; the run folder."""
    fit_and_export(recipe, world)
    world.barrier()  # rank 0 writes last
    return Path(recipe.output_dir)


def refusal(recipe: Recipe, world: World) -> str:
    """The message that all ranks are refused with."""
    message = ""
    try:
        fit_and_export(recipe, world)
    except UserError as error:
        message = str(error)
    assert set(world.gather(message)) == {message}
    return message


@contextmanager
def told(*loggers: str, level: int = logging.NOTSET) -> Iterator[list[str]]:
    """What these parts of the program say meanwhile, on rank 0."""
    said: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    found = [logging.getLogger(name) for name in loggers]
    for logger in found:
        logger.addHandler(handler)
    try:
        yield said
    finally:
        for logger in found:
            logger.removeHandler(handler)


def a_window(world: World, number: int = 4) -> Any:
    """Four short sequences, two a micro batch."""
    sequences = [Sequence([5, 6, 7, 8], [-100, 6, 7, 8])] * number
    return build_window(sequences, Packing(2), world.rank, world.size, world.device)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def weights_hash(run_dir: Path) -> str:
    """Of the exported tensors, bit for bit."""
    digest = hashlib.sha256()
    for file in sorted((run_dir / "model").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokens_of(run_dir: Path) -> list[list[Generated]]:
    return [read_round(path) for path in sorted((run_dir / "selfgen").glob("*.parquet"))]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without what a clock or a resume in mid-round changes."""
    return [{k: v for k, v in row.items() if k not in TIMES + ROUND_COSTS} for row in rows_of(run_dir)]


def column(run_dir: Path, key: str) -> list[Any]:
    return [row[key] for row in rows_of(run_dir)]


def checkpoints_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# -- comparisons that several modules make -----------------------------------------------------------------------------


def assert_interrupted_equals_uninterrupted(
    world: World, folder: Path, adapter: str, stage: int, method: str, **more: Any
) -> None:
    """Stopped after every step, mid-round included, and continued: weights, tokens and metrics bit for bit."""
    settings = {
        "method__name": method,
        "adapter__kind": adapter,
        "adapter__dropout": 0.1,
        "deepspeed": zero(stage),
        "train__max_steps": 5,
        "train__schedule": "cosine",
        "selfgen__refresh_every": 3,
        "method__rac__cut": "uniform",
        "data__eval_fraction": 0.2,
        "eval__every": 2,
    } | more
    whole = trained(fresh(folder, "uninterrupted", world, **settings), world)
    recipe = fresh(folder, "interrupted", world, **settings)
    cut, stops = Path(recipe.output_dir), 0
    for _ in range(10):
        try:
            fit_and_export(recipe, stopping(world))
            break
        except StopRequested:
            stops += 1
    world.barrier()
    assert stops == 4
    assert weights_hash(cut) == weights_hash(whole)
    assert tokens_of(cut) == tokens_of(whole)
    assert metrics_of(cut) == metrics_of(whole)
    assert checkpoints_of(cut) == ["step-00000004", "step-00000005"]  # keep: 2


def assert_generation_leaves_training_as_it_was(
    world: World, folder: Path, adapter: str, deepspeed: str, **more: Any
) -> None:
    """With gradient checkpointing and dropout, the next steps are the same to the bit after a generation."""
    losses, weights = [], []
    for generates in (False, True):
        recipe = fresh(
            folder,
            "trace",
            world,
            adapter__kind=adapter,
            adapter__dropout=0.2 if adapter == "lora" else 0.0,
            deepspeed=deepspeed,
            model__gradient_checkpointing=True,
            **more,
        )
        trainer = trainer_for(recipe, world)
        sequences = [Sequence(list(range(3, 20)), [-100] * 9 + list(range(12, 20)))] * 4
        window = build_window(sequences, Packing(2), world.rank, world.size, world.device)
        found = []
        for number in range(3):
            if generates:
                requests = [free_request([5, 6, 7], 6 + i, 11 * i, frozenset({2})) for i in range(3)]
                trainer.generator.sampler.sample(requests, Sampling(), 1)
            torch.manual_seed(number)
            found.append(train_step(trainer.engine, window, 1e-2, world).loss)
        losses.append(found)
        state = full_state_dict(trainer.engine.module)
        weights.append({name: tensor.clone() for name, tensor in (state or {}).items()})
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def uneven_answers(world: World, folder: Path, number: int, **settings: Any) -> list[list[int]]:
    """Answers to requests that end at different steps, or to fewer requests than ranks; all ranks have them."""
    trainer = trainer_for(fresh(folder, "uneven", world, selfgen__batch=2, **settings), world)
    requests = [
        free_request([4 + i, 60, 70 - i], 3 + 5 * i, 12345 + 11 * i, frozenset(range(3, 9))) for i in range(number)
    ]
    results, _, _ = trainer.generator.sampler.sample(requests, Sampling(), 1)
    mine = [result.tokens for result in results]
    assert world.gather(mine) == [mine] * world.size
    return mine


def stopped_often(recipe: Recipe, world: World, times: int) -> Path:
    """Start it `times` times, with a stop after each step; the run folder."""
    for _ in range(times):
        with suppress(StopRequested):
            fit_and_export(recipe, stopping(world))
    world.barrier()
    return Path(recipe.output_dir)

"""A run folder that goes on, fills up or is damaged: one message, or what can be made again is made again."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.distributed.phases import Phases, parse_faults
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run.layout import round_path
from ssgen_ds.selfgen.round_file import read_round
from ssgen_ds.training.schedules import learning_rate_at, mix_rate_at
from tests.support.damage import FILES
from tests.support.rank_runs import (
    column,
    fresh,
    refusal,
    stopped_often,
    tokens_of,
    told,
    trained,
    weights_hash,
    zero,
)
from tests.support.ranks import on_each, ranks

# -- more steps --------------------------------------------------------------------------------------------------------


def longer(recipe: Recipe, max_steps: int, **changes: Any) -> Recipe:
    train = recipe.train.model_copy(update={"max_steps": max_steps})
    return recipe.model_copy(update={"train": train, **changes})


@ranks(1)
def test_a_run_trains_for_longer_by_the_schedules_of_the_new_length(world, folder):
    """Three steps, then six, in one go and with stops; then a seventh in a branch.

    Round 1 would have had four steps, and was cut short by a run of three; its fourth is generated later.
    """
    settings = {
        "method__name": "bss",
        "method__bss__schedule": "linear",
        "train__schedule": "cosine",
        "train__max_steps": 3,
        "selfgen__refresh_every": 4,
    }
    whole, cut = (fresh(folder, f"longer-{name}", world, **settings) for name in ("whole", "cut"))
    for recipe in (whole, cut):
        trained(recipe, world)
    one, two = trained(longer(whole, 6), world), stopped_often(longer(cut, 6), world, 4)
    assert weights_hash(one) == weights_hash(two), "with a stop after every step the same run"
    assert tokens_of(one) == tokens_of(two)
    assert column(one, "loss") == column(two, "loss")
    branch = fresh(folder, "longer-branch", world, **settings)
    trained(longer(branch, 7, resume=str(two)), world)
    assert column(two, "step") == [1, 2, 3, 4, 5, 6]
    assert json.loads((two / "finished.json").read_text())["step"] == 6
    lengths = [3, 3, 3, 6, 6, 6]
    assert column(two, "lr") == [learning_rate_at(s, n, 1e-2, "cosine", 0) for s, n in enumerate(lengths, 1)]
    assert column(two, "mix_rate") == [mix_rate_at(s, n, 0.3, "linear") for s, n in enumerate(lengths, 1)]
    steps = column(Path(branch.output_dir), "step")
    assert steps == [1, 2, 3, 4, 5, 6, 7], "metrics.jsonl of the branch begins with those of its origin"


# -- full disks --------------------------------------------------------------------------------------------------------


def disk_settings(size: int) -> dict[str, Any]:
    """Several ranks share the model."""
    blocks = {"selfgen__block": "auto", "deepspeed": zero(3 if size > 1 else 0)}
    return {"method__name": "bss", "train__max_steps": 3, **blocks}


@pytest.fixture(scope="module")
def roomy(world, folder) -> Path:
    """The run on a disk that has room."""
    return trained(fresh(folder, "roomy", world, **disk_settings(world.size)), world)


@on_each(1, 2)
@pytest.mark.parametrize("where", ["round-file@1", "metrics@1", "metrics@3", "call-cost@1"])
def test_a_full_disk_is_one_message_and_leaves_nothing_empty(world, folder, roomy, where, size):
    """Nothing can be written there: one message on all ranks, no half or empty file, and the run goes on to the same
    end."""
    recipe = fresh(folder, "full", world, **disk_settings(size))
    fault = "enospc@{}:0:{}".format(*where.split("@"))
    refused = refusal(recipe, replace(world, phases=Phases(world.rank, parse_faults(fault))))
    assert "No space left on device" in refused and "rank 0 on " in refused
    left = [path for path in Path(recipe.output_dir).rglob("*") if path.is_file()]
    assert [path for path in left if not path.stat().st_size or ".partial" in str(path)] == []
    world.barrier()  # before rank 0 writes again
    run = trained(recipe, world)
    assert weights_hash(run) == weights_hash(roomy) and column(run, "step") == [1, 2, 3]


# -- damage ------------------------------------------------------------------------------------------------------------

AGAIN: dict[str, Any] = {  # from step 5 on examples come again, and what they were before is a guess
    "method__name": "bss",
    "selfgen__noise": "common",
    "train__max_steps": 6,
    "log__tensorboard": True,
}
ROUND = "selfgen/round-00001.parquet"
DAMAGED = {
    **{f"round-{damage}": (ROUND, FILES[damage]) for damage in ("torn", "nul-tail")},
    "round-gone": (ROUND, None),
    "events-torn": ("tensorboard/events*", FILES["torn"]),
}


def what_was_trained(run: Path) -> list[Any]:
    """Weights, losses and the tokens of the last rounds; a guess changes the passes that it takes to make them."""
    rounds = [[(record.example_id, record.mixed.ids) for record in read_round(round_path(run, n))] for n in (2, 3)]
    return [weights_hash(run), column(run, "loss"), rounds]


@pytest.fixture(scope="module")
def finished(world, folder) -> tuple[Recipe, list[Any]]:
    """A finished run, and what was trained in it."""
    recipe = fresh(folder, "finished-run", world, **AGAIN)
    return recipe, what_was_trained(trained(recipe, world))


@pytest.fixture(scope="module")
def begun(world, folder) -> Recipe:
    """The same run after four of six steps."""
    recipe = fresh(folder, "begun-run", world, **AGAIN)
    stopped_often(recipe, world, 4)
    return recipe


@ranks(1)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_that_training_does_not_need_is_said_and_changes_nothing(world, finished, begun, damage):
    pattern, spoil = DAMAGED[damage]
    run = Path(f"{begun.output_dir}-{damage}")
    shutil.copytree(begun.output_dir, run)
    (file,) = sorted(run.glob(pattern))[-1:]
    file.unlink() if spoil is None else file.write_bytes(spoil(file.read_bytes()))
    with told("ssgen_ds", level=logging.WARNING) as said:
        trained(begun.model_copy(update={"output_dir": str(run)}), world)
    assert what_was_trained(run) == finished[1]
    about = [text for text in said if "cannot read" in text or "tensorboard" in text]
    assert len(about) == damage.startswith("round-"), said
    assert all(text.endswith("earlier visits are no guesses, generation costs more") for text in about)


@ranks(1)
@pytest.mark.parametrize("damage", ["torn", "empty"])
def test_a_damaged_model_of_a_finished_run_is_written_once_more(world, finished, damage):
    recipe, expected = finished
    file = Path(recipe.output_dir) / "model" / "model.safetensors"
    file.write_bytes(FILES[damage](file.read_bytes()))
    with told("ssgen_ds", level=logging.WARNING) as said:
        trained(recipe, world)
    assert what_was_trained(Path(recipe.output_dir)) == expected
    (about,) = [text for text in said if "its model is not all there" in text]
    assert "model.safetensors" in about and "bytes instead of" in about

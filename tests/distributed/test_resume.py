"""Runs that are stopped and continued on two ranks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.distributed.world import World
from ssgen_ds.errors import StopRequested
from ssgen_ds.selfgen.round_file import to_row
from ssgen_ds.train import fit_and_export
from tests.support.rank_runs import (
    ROUND_COSTS,
    STAGES,
    assert_interrupted_equals_uninterrupted,
    fresh,
    metrics_of,
    refusal,
    rows_of,
    tokens_of,
    trained,
    weights_hash,
    zero,
)
from tests.support.ranks import ranks
from tests.support.stopping import stopping

STREAMING = {
    "data__streaming": True,
    "data__eval_fraction": 0.0,
    "eval__every": None,
    "selfgen__noise": "common",
}


@ranks(2)
@pytest.mark.parametrize(
    ("adapter", "stage", "method", "more"),
    [
        pytest.param("none", 0, "sft", {}, id="none-0"),
        pytest.param("none", 1, "bss", {}, id="none-1"),
        pytest.param("none", 2, "bss+rac", {}, id="none-2"),
        pytest.param("none", 3, "bss+rac", {}, id="none-3"),
        pytest.param("lora", 2, "bss+rac", {}, id="lora-2"),
        pytest.param("lora", 3, "bss+rac", {}, id="lora-3"),
        pytest.param("none", 2, "bss", STREAMING, id="streaming"),
    ],
)
def test_interrupted_equals_uninterrupted(world, folder, adapter, stage, method, more):
    assert_interrupted_equals_uninterrupted(world, folder, adapter, stage, method, **more)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_equals_uninterrupted_in_bfloat16(world, folder, stage):
    assert_interrupted_equals_uninterrupted(world, folder, "none", stage, "rac", model__dtype="bfloat16")


def two_epochs(world: World, folder: Path, name: str, stage: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was generated, and what it cost, of weights that stand still with common noise.

    `name`: `whole`, in one go; `cut`, stopped after every step; `bare`, and the rounds' files removed each time.
    """
    recipe = fresh(
        folder,
        f"visits-{name}",
        world,
        method__name="bss+rac",
        method__rac__target="rewrite",
        method__rac__rewrite_cue="Gold: {reference}",
        data__max_response_tokens=16,
        deepspeed=zero(stage),
        selfgen__noise="common",
        selfgen__refresh_every=1,
        train__lr=1e-30,
        train__global_batch=13,
        train__max_steps=None,
        train__epochs=2,
    )
    run, generated = Path(recipe.output_dir), []
    for _ in range(1 if name == "whole" else 4):
        with suppress(StopRequested):
            fit_and_export(recipe, world if name == "whole" else stopping(world))
        world.barrier()
        if name == "bare" or len(tokens_of(run)) == 4:
            generated += [to_row(item) for group in tokens_of(run) for item in group]
        world.barrier()
        if name == "bare" and world.is_main:
            for file in (run / "selfgen").glob("*.parquet"):
                file.unlink()
        world.barrier()
    return generated, [{key: row[key] for key in ("selfgen_passes", *ROUND_COSTS)} for row in rows_of(run)]


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_earlier_visits_make_generation_cheaper_and_change_nothing_else(world, folder, stage):
    """Nothing is trained (a vanishing rate), so in epoch 2 each guess is right: one pass; the same after restarts."""
    runs = {name: two_epochs(world, folder, name, stage) for name in ("whole", "cut", "bare")}
    tokens = {name: [{**item, "bss_passes": None} for item in generated] for name, (generated, _) in runs.items()}
    assert tokens["whole"] == tokens["cut"] == tokens["bare"]
    assert runs["whole"] == runs["cut"]
    (generated, costs), (again, dear) = runs["whole"], runs["bare"]
    assert len(costs) == 4
    second = [item["bss_passes"] for item in generated if item["visit"] == 1 and any(item["coins"])]
    assert second
    assert set(second) == {1}
    assert max(item["bss_passes"] for item in again if item["visit"] == 1) > 1
    calls = [cost["selfgen_calls"] for cost in costs]
    assert sum(calls[2:]) < sum(calls[:2])
    assert sum(calls[2:]) < sum(cost["selfgen_calls"] for cost in dear[2:])


@ranks(2)
def test_resume_from_a_named_checkpoint(world, folder):
    """From step 3's checkpoint in mid-round, in a folder of its own; the rows of the steps before come along."""
    every_step = {"checkpoint__every": 1, "checkpoint__keep": 9}
    settings = {"method__name": "bss", "deepspeed": zero(2), **every_step}
    whole = trained(fresh(folder, "path-whole", world, **settings), world)
    path = str(whole / "checkpoints" / "step-00000003")
    other = fresh(folder, "path-other", world, **settings, resume=path, train__lr=0.5)
    assert "train.lr: 0.01 -> 0.5" in refusal(other, world)
    branch = trained(fresh(folder, "path-branch", world, **settings, resume=path), world)
    assert [row["step"] for row in metrics_of(branch)] == [1, 2, 3, 4]
    assert metrics_of(whole)[:3] == metrics_of(branch)[:3]
    assert weights_hash(whole) == weights_hash(branch)

"""Broken checkpoints, full disks, values that are not finite and other inputs, on real ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from ssgen_ds.checkpoint import choose
from ssgen_ds.checkpoint.save import problems_of
from ssgen_ds.distributed.phases import Phases, parse_faults
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import NonFiniteError, StopRequested, UserError
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run import lock as run_lock
from ssgen_ds.train import fit_and_export
from ssgen_ds.training.step import token_loss
from tests.support.damage import DAMAGE, flip_a_bit, truncate
from tests.support.rank_runs import (
    checkpoints_of,
    column,
    fresh,
    metrics_of,
    refusal,
    stopped_often,
    told,
    trained,
    weights_hash,
    zero,
)
from tests.support.ranks import ranks
from tests.support.stopping import stopping
from tests.support.tiny_runs import tiny_recipe

EVERY_STEP: dict[str, Any] = {
    "method__name": "bss",
    "deepspeed": zero(3),
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
}
RECOVERY = ("ssgen_ds.checkpoint.choose", "ssgen_ds.training.foundations")  # who says what was chosen
NAMED = {
    "truncated": r"shard-00001-of-00002.safetensors: \d+ bytes instead of \d+ \(truncated\)",
    "flipped": r"shard-00000-of-00002.safetensors: its content has changed \(SHA-256 differs\)",
    "shard-missing": "shard-00001-of-00002.safetensors: missing",
    "marker-empty": "COMPLETE: unreadable",
    "marker-missing": "COMPLETE: missing, so the checkpoint is not complete",
    "index-changed": "index.json: 2 bytes instead of",
    "round-missing": "round.parquet: missing",
}


@pytest.fixture(scope="module")
def undamaged(world, folder) -> Path:
    return trained(fresh(folder, "undamaged", world, **EVERY_STEP), world)


# -- broken checkpoints ------------------------------------------------------------------------------------------------


def damaged_run(world: World, folder: Path, undamaged: Path, *damages: Callable[[Path], None]) -> Recipe:
    """The undamaged run as it was after step 3, with damages to the checkpoints of steps 3, 2 and 1."""
    recipe = fresh(folder, "damaged", world, **EVERY_STEP)
    run = Path(recipe.output_dir)
    if world.is_main:
        shutil.copytree(undamaged, run)
        (run / "finished.json").unlink()
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        for step, damage in zip((3, 2, 1), damages, strict=False):
            damage(run / "checkpoints" / f"step-{step:08d}")
    world.barrier()
    return recipe


@ranks(2)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(world, folder, undamaged, damage):
    """And a rank that sees no checkpoint at all, as on a stale network file system, goes along with rank 0."""
    recipe = damaged_run(world, folder, undamaged, DAMAGE[damage])
    blind = mock.patch.object(choose, "candidates", return_value=[]) if world.rank == 1 else nullcontext()
    with told(*RECOVERY) as said, blind:
        run = trained(recipe, world)
    broken, used = world.broadcast(said)
    assert re.search(NAMED[damage], broken)
    assert "step-00000003 is broken" in broken
    assert used.startswith("going on from") and used.endswith("step-00000002")
    assert weights_hash(run) == weights_hash(undamaged)
    assert checkpoints_of(run) == ["broken-step-00000003", *(f"step-0000000{step}" for step in (1, 2, 3, 4))]


@ranks(2)
def test_step_0_is_never_a_fallback(world, folder, undamaged):
    recipe = damaged_run(world, folder, undamaged, truncate, flip_a_bit, DAMAGE["marker-missing"])
    before = checkpoints_of(Path(recipe.output_dir))
    refused = refusal(recipe, world)
    assert checkpoints_of(Path(recipe.output_dir)) == before
    assert "can be used; nothing was changed" in refused
    for part in ("step-00000003", "step-00000002", "step-00000001"):
        assert part in refused


# -- full disks --------------------------------------------------------------------------------------------------------


def refused_by_disk(world: World, recipe: Recipe, fault: str) -> tuple[str, list[str]]:
    """What all ranks are refused with when one cannot write, and the checkpoints that are left."""
    refused = refusal(recipe, replace(world, phases=Phases(world.rank, parse_faults(fault))))
    left = checkpoints_of(Path(recipe.output_dir))
    world.barrier()  # before the next start changes them
    return refused, left


@ranks(2)
@pytest.mark.parametrize(
    ("fault", "rank", "error"),
    [
        pytest.param("enospc@shard:1:4", 1, "No space left on device", id="shard"),
        pytest.param("eacces@publish:0:4", 0, "Permission denied", id="publish"),
    ],
)
def test_a_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(world, folder, undamaged, fault, rank, error):
    recipe = fresh(folder, "disk", world, **EVERY_STEP | {"checkpoint__every": 2})
    refused, left = refused_by_disk(world, recipe, fault)
    assert "the checkpoint of step 4 was not written" in refused
    assert f"rank {rank} on " in refused and error in refused
    assert "step-00000002 is complete" in refused
    assert left == ["step-00000002"]
    run = trained(recipe, world)
    assert weights_hash(run) == weights_hash(undamaged) and column(run, "step") == [1, 2, 3, 4]


@ranks(2)
def test_a_model_that_cannot_be_written_costs_nothing_but_another_start(world, folder, undamaged):
    recipe = fresh(folder, "disk", world, **EVERY_STEP | {"checkpoint__every": 2})
    refused, left = refused_by_disk(world, recipe, "enospc@model:0:4")
    assert "the trained model was not written; step 4, the last, is in the newest checkpoint" in refused
    assert "rank 0 on " in refused and "No space left on device" in refused
    assert left[-1] == "step-00000004"
    run = trained(recipe, world)
    assert weights_hash(run) == weights_hash(undamaged) and column(run, "step") == [1, 2, 3, 4]


# -- values that are not finite ----------------------------------------------------------------------------------------


@contextmanager
def poisoned(steps: tuple[int, ...], rank: int, world: World) -> Iterator[None]:
    """The loss of one rank is NaN in these (1-based) steps."""

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = token_loss(*args, **kwargs)
        return value * float("nan") if world.rank == rank and world.phases.step in steps else value

    with mock.patch("ssgen_ds.training.step.token_loss", loss):
        yield


def stopped_and_poisoned(recipe: Recipe, world: World, times: int) -> Path:
    """Started `times` times with a stop after each step, and NaN in steps 2 and 3."""
    for _ in range(times):
        # The phase's step is that of the world given: `stopping` hides it from the poison.
        stopper = stopping(world)
        with suppress(StopRequested), poisoned((2, 3), 1, stopper):
            fit_and_export(recipe, stopper)
    world.barrier()
    return Path(recipe.output_dir)


@ranks(2)
def test_updates_left_out_are_counted_over_restarts_and_too_many_in_a_row_end_the_run(world, folder):
    """Steps 2 and 3 of 5 are not finite: two in a row are allowed, in one go or with a restart between, one is not."""
    settings: dict[str, Any] = {"deepspeed": zero(2), "train__max_steps": 5, "checkpoint__every": 1}
    with poisoned((2, 3), 1, world):
        allowed = trained(fresh(folder, "skip-allowed", world, **settings, train__max_skipped_steps=2), world)
    cut = stopped_and_poisoned(fresh(folder, "skip-cut", world, **settings, train__max_skipped_steps=2), world, 5)
    assert [loss is None for loss in column(allowed, "loss")] == [False, True, True, False, False]
    assert column(allowed, "skipped_steps") == [0, 1, 2, 2, 2]
    assert weights_hash(allowed) == weights_hash(cut), "stopped after every step and continued: the same run"

    recipe = fresh(folder, "skip-forbidden", world, **settings, train__max_skipped_steps=1)
    forbidden = stopped_and_poisoned(recipe, world, 2)
    with poisoned((2, 3), 1, world), pytest.raises(NonFiniteError) as error:
        fit_and_export(recipe, world)
    first, second = world.gather(str(error.value))
    assert first == second
    assert first.startswith("step 3: the loss is not finite, the update was left out (2 in a row)")
    assert "row-" in first
    last = json.loads((forbidden / "attempts.jsonl").read_text().splitlines()[-1])
    assert last["outcome"] == "failed" and first in last["reason"]
    assert checkpoints_of(forbidden) == ["step-00000001", "step-00000002"]


@ranks(2)
@pytest.mark.parametrize(("stage", "strategy"), [(0, "auto"), (3, "sharded"), (3, "gathered")])
def test_logits_that_are_not_finite_end_the_run_on_all_ranks(world, folder, stage, strategy):
    """Those of one rank while it generates; all ranks end with the same words."""
    settings = {"method__name": "bss", "deepspeed": zero(stage), "selfgen__strategy": strategy}
    recipe = fresh(folder, "logits", world, **settings)
    original = torch.Tensor.topk

    def topk(scores: torch.Tensor, *args: Any, **more: Any) -> Any:
        broken = world.rank == 1 and world.phases.names[:1] == ("start",) and "mixing" in world.phases.names
        return original(scores * float("inf") if broken else scores, *args, **more)

    with mock.patch.object(torch.Tensor, "topk", topk), pytest.raises(NonFiniteError) as error:
        fit_and_export(recipe, world)
    first, second = world.gather(str(error.value))
    assert first == second
    assert first.startswith("generation on rank 1: the logits at response position ")


# -- what must not have changed, and what may be lost ------------------------------------------------------------------


@ranks(2)
def test_other_inputs_are_refused_and_other_versions_are_said(world, folder):
    inputs = folder / "changed-inputs"
    if world.is_main:
        inputs.mkdir()
        shutil.copytree(folder / "llama", inputs / "llama")
        shutil.copyfile(folder / "train.jsonl", inputs / "train.jsonl")
    world.barrier()
    recipe = tiny_recipe(inputs, inputs / "run", checkpoint__every=2)
    stopped_often(recipe, world, 1)

    def refused_with(file: Path, old: str, new: str) -> str:
        text = file.read_text()
        world.barrier()
        if world.is_main:
            assert old in text, (old, file)
            file.write_text(text.replace(old, new, 1))
        world.barrier()
        refused = refusal(recipe, world)
        world.barrier()
        if world.is_main:
            file.write_text(text)
        world.barrier()
        return refused

    data = refused_with(inputs / "train.jsonl", '"completion": "', '"completion": "sun ')
    assert "was trained with another data (fingerprint" in data
    tokenizer = refused_with(inputs / "llama" / "tokenizer.json", '"!"', '"é"')
    assert "was trained with another tokenizer (fingerprint" in tokenizer
    other = mock.patch("ssgen_ds.training.foundations.run_folder.package_versions", return_value={"torch": "0.0"})
    with told(*RECOVERY) as said, other:
        trained(recipe, world)
    version = "\n".join(world.broadcast(said))
    assert "was written with torch 2." in version and "now 0.0" in version


@ranks(2)
def test_a_folder_that_the_nodes_do_not_share_is_refused_on_all_ranks(world, folder):
    """Each rank sees a folder of its own by the name of output_dir, as on nodes that share no file system."""
    own = folder / f"seen-by-{world.rank}"
    with (
        mock.patch.object(run_lock, "SHARED_SECONDS", 1.0),
        pytest.raises(UserError) as error,
        run_lock.locked(own, world),
    ):
        pass
    first, second = world.gather(str(error.value))
    assert first == second
    assert first.startswith("output_dir: rank 1 on ") and "put it on a file system that all nodes share" in first
    assert not list(folder.glob("seen-by-*")), "nothing is left of it"


@pytest.fixture
def adapter_run(world, folder) -> Recipe:
    """A finished run of LoRA."""
    recipe = fresh(folder, "adapter-only", world, adapter__kind="lora", deepspeed=zero(3))
    trained(recipe, world)
    return recipe


@ranks(2)
def test_a_lora_checkpoint_holds_the_adapter_and_nothing_else(adapter_run):
    """And it is as small as that."""
    run = Path(adapter_run.output_dir)
    path = run / "checkpoints" / "step-00000004"
    names: set[str] = set()
    for file in sorted(path.glob("shard-*")):
        with safe_open(file, framework="pt") as shard:
            names |= set(shard.keys())
    assert problems_of(path) == []
    assert names and all(".lora_" in name for name in names)
    assert {name.partition(":")[0] for name in names} == {"weight", "exp_avg", "exp_avg_sq"}
    finished = json.loads((run / "finished.json").read_text())
    assert sum(file.stat().st_size for file in path.glob("shard-*")) == finished["checkpoint_bytes"]
    assert 0 < finished["checkpoint_seconds"] < 60


@ranks(2)
def test_a_finished_run_without_its_model_writes_it_again_or_says_that_it_cannot(world, adapter_run):
    run = Path(adapter_run.output_dir)
    before = weights_hash(run)

    def lose(*names: str) -> None:
        world.barrier()
        if world.is_main:
            for name in names:
                shutil.rmtree(run / name)
        world.barrier()

    lose("model")
    with told(*RECOVERY) as said:
        trained(adapter_run, world)
    assert weights_hash(run) == before
    assert problems_of(run / "checkpoints" / "step-00000004") == []
    first = world.broadcast(said)[0]
    assert "its model is not all there" in first and "model: missing" in first
    lose("model", "checkpoints")
    assert "no checkpoint is left to go on from" in refusal(adapter_run, world)


@ranks(2)
def test_an_offloaded_optimizer_goes_on_where_it_was(world, folder):
    """DeepSpeed's CPU Adam computes its bias correction by repeated multiplication and, after a restart, as a power:
    equal to rounding, not to the bit."""
    settings = {"deepspeed": "ds_configs/zero3_offload.json"}
    whole = trained(fresh(folder, "offload-whole", world, **settings), world)
    cut = stopped_often(fresh(folder, "offload-cut", world, **settings), world, 4)
    losses = column(whole, "loss")
    assert len(losses) == 4
    assert [row["loss"] for row in metrics_of(cut)] == pytest.approx(losses, rel=1e-6)

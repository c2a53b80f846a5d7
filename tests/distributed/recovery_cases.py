"""Broken checkpoints, full disks, other numbers of ranks, values that are not numbers: cases of `test_recovery.py`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ssgen_ds import recovery, run_lock
from ssgen_ds.checkpoint import problems_of
from ssgen_ds.config import Recipe
from ssgen_ds.distributed import World
from ssgen_ds.errors import NonFiniteError, StopRequested, UserError
from ssgen_ds.phases import Phases, parse_faults
from ssgen_ds.step import token_loss
from ssgen_ds.train import fit_and_export
from tests.distributed.numerics_cases import Case, fresh, metrics_of, resume_case, tokens_of, weights_hash
from tests.support.damage import DAMAGE, flip_a_bit, truncate
from tests.support.stopping import stopping
from tests.support.tiny_runs import tiny_recipe

EVERY_STEP: dict[str, Any] = {
    "method__name": "bss",
    "deepspeed": "ds_configs/zero3.json",
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
}


def checkpoints_of(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(recipe.output_dir) / "checkpoints").iterdir())


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the recovery says meanwhile, on rank 0."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"ssgen_ds.{name}") for name in ("recovery", "build")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def refusal(recipe: Recipe, world: World) -> str:
    """The message that all ranks are refused with."""
    message = ""
    try:
        fit_and_export(recipe, world)
    except UserError as error:
        message = str(error)
    assert set(world.gather(message)) == {message}
    return message


# -- F6, F8 ------------------------------------------------------------------------------------------------------------


def damage_case(world: World, folder: Path) -> dict[str, Any]:
    """Each damage in the newest checkpoint: named, and the one before is used; all damaged: refused, nothing changed.

    A rank that sees no checkpoints at all, as on a stale network file system, goes along with rank 0.
    """
    whole = fresh(folder, "undamaged", world, **EVERY_STEP)
    fit_and_export(whole, world)
    results: dict[str, Any] = {}
    damaged = fresh(folder, "damaged", world, **EVERY_STEP)
    run_dir = Path(damaged.output_dir)

    def restore(*damages: Callable[[Path], None]) -> None:
        if world.is_main:
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(whole.output_dir, run_dir)
            (run_dir / "finished.json").unlink()
            shutil.rmtree(run_dir / "model")
            shutil.rmtree(run_dir / "checkpoints" / "step-00000004")  # so that there is something left to train
            for step, damage in zip((3, 2, 1), damages, strict=False):
                damage(run_dir / "checkpoints" / f"step-{step:08d}")
        world.barrier()

    blind = mock.patch.object(recovery, "candidates", return_value=[])
    for name, damage in DAMAGE.items():
        restore(damage)
        with warnings() as said, suppress_on(world.rank == 1, blind):
            fit_and_export(damaged, world)
        results[name] = {
            "said": said,
            "checkpoints": checkpoints_of(damaged),
            "same": weights_hash(run_dir) == weights_hash(Path(whole.output_dir)),
        }
    restore(truncate, flip_a_bit, DAMAGE["marker-missing"])
    before = checkpoints_of(damaged)
    results["all"] = {"refused": refusal(damaged, world), "unchanged": checkpoints_of(damaged) == before}
    return results


@contextmanager
def suppress_on(condition: bool, patch: Any) -> Iterator[None]:
    if not condition:
        yield
        return
    with patch:
        yield


# -- F7 ----------------------------------------------------------------------------------------------------------------


def disk_case(fault: str) -> Case:
    """A rank that cannot write: all are refused, the old checkpoint stays, and the run goes on from it."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        recipe = fresh(folder, "disk", world, **EVERY_STEP | {"checkpoint__every": 2})
        bad = replace(world, phases=Phases(world.rank, parse_faults(fault)))
        refused = refusal(recipe, bad)
        left = checkpoints_of(recipe)
        fit_and_export(recipe, world)
        whole = folder / f"ranks{world.size}" / "undamaged"
        return {
            "refused": refused,
            "left": left,
            "same": weights_hash(Path(recipe.output_dir)) == weights_hash(whole),
            "steps": [row["step"] for row in metrics_of(Path(recipe.output_dir))],
        }

    return case


# -- F9 ----------------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned(steps: tuple[int, ...], rank: int, world: World) -> Iterator[None]:
    """The loss of one rank is NaN in these (1-based) steps."""

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = token_loss(*args, **kwargs)
        return value * float("nan") if world.rank == rank and world.phases.step in steps else value

    with mock.patch("ssgen_ds.step.token_loss", loss):
        yield


def skipping_case(world: World, folder: Path) -> dict[str, Any]:
    """Steps 2 and 3 of 5 are not finite: two in a row are allowed, in one go or with a restart between, one is not."""
    settings: dict[str, Any] = {"deepspeed": "ds_configs/zero2.json", "train__max_steps": 5, "checkpoint__every": 1}
    allowed = fresh(folder, "skip-allowed", world, **settings, train__max_skipped_steps=2)
    with poisoned((2, 3), 1, world):
        fit_and_export(allowed, world)
    cut = fresh(folder, "skip-cut", world, **settings, train__max_skipped_steps=2)
    message = ""
    for _ in range(5):
        # The phase's step is that of the world given: `stopping` hides it from the poison.
        stopper = stopping(world)
        with suppress(StopRequested), poisoned((2, 3), 1, stopper):
            fit_and_export(cut, stopper)
    forbidden = fresh(folder, "skip-forbidden", world, **settings, train__max_skipped_steps=1)
    with suppress(StopRequested), poisoned((2, 3), 1, stopper := stopping(world)):
        fit_and_export(forbidden, stopper)
    with suppress(StopRequested), poisoned((2, 3), 1, stopper := stopping(world)):
        fit_and_export(forbidden, stopper)
    try:
        with poisoned((2, 3), 1, world):
            fit_and_export(forbidden, world)
    except NonFiniteError as error:
        message = str(error)
    rows = metrics_of(Path(allowed.output_dir))
    attempts = (Path(forbidden.output_dir) / "attempts.jsonl").read_text().splitlines()
    return {
        "message": world.gather(message),
        "last_attempt": json.loads(attempts[-1]),
        "losses": [row["loss"] is None for row in rows],
        "skipped": [row["skipped_steps"] for row in rows],
        "same": weights_hash(Path(allowed.output_dir)) == weights_hash(Path(cut.output_dir)),
        "checkpoints": checkpoints_of(forbidden),
    }


def infinite_logits_case(stage: int, strategy: str) -> Case:
    """Logits of one rank are not finite while it generates: all ranks end with the same words."""

    def case(world: World, folder: Path) -> str:
        recipe = fresh(
            folder,
            f"logits-{stage}-{strategy}",
            world,
            method__name="bss",
            deepspeed=f"ds_configs/zero{stage}.json",
            selfgen__strategy=strategy,
        )
        original = torch.Tensor.topk

        def topk(scores: torch.Tensor, *args: Any, **more: Any) -> Any:
            broken = world.rank == 1 and world.phases.names[:1] == ("start",) and "mixing" in world.phases.names
            return original(scores * float("inf") if broken else scores, *args, **more)

        message = ""
        with mock.patch.object(torch.Tensor, "topk", topk):
            try:
                fit_and_export(recipe, world)
            except NonFiniteError as error:
                message = str(error)
        assert set(world.gather(message)) == {message}
        return message

    return case


# -- F12 ---------------------------------------------------------------------------------------------------------------

RESHARDED = {
    "none-1": {"deepspeed": "ds_configs/zero1.json"},
    "none-2": {"deepspeed": "ds_configs/zero2.json"},
    "none-3": {"deepspeed": "ds_configs/zero3.json"},
    "lora-3": {"deepspeed": "ds_configs/zero3.json", "adapter__kind": "lora"},
    "cross": {"deepspeed": "ds_configs/zero3.json"},  # goes on at another ZeRO stage
    "8bit": {"deepspeed": "ds_configs/zero2.json", "train__optimizer": "adamw_8bit"},  # moments are coded anew
}


def resharded(folder: Path, name: str, origin: str, **more: Any) -> Recipe:
    settings = {"method__name": "bss+rac", "train__max_steps": 6, **RESHARDED[name], **more}
    return tiny_recipe(folder, folder / "resharded" / f"{origin}-{name}", adapter__rank=4, **settings)


def leave_case(name: str) -> Case:
    """Three of six steps, on as many ranks as there are."""

    def case(world: World, folder: Path) -> None:
        recipe = resharded(folder, name, f"from{world.size}")
        for _ in range(3):
            with suppress(StopRequested):
                fit_and_export(recipe, stopping(world))

    return case


def take_case(name: str, origin: int) -> Case:
    """Go on with what `origin` ranks have left, and compare with two ranks that did all of it."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        whole = resharded(folder, name, "whole")
        if world.size == 2:
            fit_and_export(whole, world)
        more = {"deepspeed": "ds_configs/zero1.json"} if name == "cross" else {}
        recipe = resharded(folder, name, f"from{origin}", **more)
        run_dir, reference = Path(recipe.output_dir), Path(whole.output_dir)
        with warnings() as said:
            fit_and_export(recipe, world)
        rows, wanted = metrics_of(run_dir), metrics_of(reference)
        return {
            "said": said,
            "steps": [row["step"] for row in rows],
            "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, wanted, strict=True)),
            "same_tokens": tokens_of(run_dir) == tokens_of(reference),
        }

    return case


# -- what else must not have changed -----------------------------------------------------------------------------------


def changed_inputs_case(world: World, folder: Path) -> dict[str, str]:
    """Another tokenizer and other data are told apart and refused; other library versions are warned of."""
    inputs = folder / f"ranks{world.size}" / "inputs"
    if world.is_main:
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        shutil.copytree(folder / "llama", inputs / "llama")
        shutil.copyfile(folder / "train.jsonl", inputs / "train.jsonl")
    world.barrier()
    run_dir = inputs / "run"
    recipe = tiny_recipe(inputs, run_dir, checkpoint__every=2)
    with suppress(StopRequested):
        fit_and_export(recipe, stopping(world))
    messages = {}

    def changed(name: str, file: Path, old: str, new: str) -> None:
        text = file.read_text()
        world.barrier()
        if world.is_main:
            assert old in text, (old, file)
            file.write_text(text.replace(old, new, 1))
        world.barrier()
        messages[name] = refusal(recipe, world)
        world.barrier()
        if world.is_main:
            file.write_text(text)
        world.barrier()

    changed("data", inputs / "train.jsonl", '"completion": "', '"completion": "sun ')
    changed("tokenizer", inputs / "llama" / "tokenizer.json", '"!"', '"é"')
    with (
        warnings() as said,
        mock.patch("ssgen_ds.build.run_folder.package_versions", return_value={"torch": "0.0"}),
    ):
        fit_and_export(recipe, world)
    return {**messages, "version": "\n".join(said)}


def unshared_case(world: World, folder: Path) -> list[str]:
    """Each rank sees a folder of its own by the name of output_dir, as on nodes that share no file system."""
    message = ""
    with mock.patch.object(run_lock, "SHARED_SECONDS", 1.0):
        try:
            with run_lock.locked(folder / f"seen-by-{world.rank}", world):
                pass
        except UserError as error:
            message = str(error)
    return world.gather(message) + [path.name for path in folder.glob("seen-by-*")]


def adapter_only_case(world: World, folder: Path) -> dict[str, Any]:
    """A LoRA checkpoint holds the adapter, and is as small as that."""
    from safetensors import safe_open

    recipe = fresh(folder, "adapter-only", world, adapter__kind="lora", deepspeed="ds_configs/zero3.json")
    fit_and_export(recipe, world)
    path = Path(recipe.output_dir) / "checkpoints" / "step-00000004"
    names: set[str] = set()
    for file in sorted(path.glob("shard-*")):
        with safe_open(file, framework="pt") as shard:
            names |= set(shard.keys())
    size = sum(file.stat().st_size for file in path.glob("shard-*"))
    finished = json.loads((Path(recipe.output_dir) / "finished.json").read_text())
    return {"names": sorted(names), "size": size, "finished": finished, "problems": problems_of(path)}


def bf16_resume(stage: int) -> Case:
    return resume_case("none", stage, "rac", model__dtype="bfloat16")


def offloaded_resume_case(world: World, folder: Path) -> list[list[float]]:
    """Losses in one go and with a restart after each step. DeepSpeed's CPU Adam computes its bias correction by
    repeated multiplication and, after a restart, as a power: equal to rounding, not to the bit."""
    losses = []
    for name in ("whole", "cut"):
        recipe = fresh(folder, f"offload-{name}", world, deepspeed="ds_configs/zero3_offload.json")
        for _ in range(4):
            with suppress(StopRequested):
                fit_and_export(recipe, world if name == "whole" else stopping(world))
        losses.append([row["loss"] for row in metrics_of(Path(recipe.output_dir))])
    return losses


CASES: dict[str, Case] = {
    "damage": damage_case,
    "disk-shard": disk_case("enospc@shard:1:4"),
    "disk-publish": disk_case("eacces@publish:0:4"),
    "disk-model": disk_case("enospc@model:0:4"),
    "skipping": skipping_case,
    **{f"logits-{s}-{how}": infinite_logits_case(s, how) for s, how in ((0, "auto"), (3, "sharded"), (3, "gathered"))},
    **{f"take-{name}": take_case(name, 1) for name in RESHARDED},
    **{f"leave-{name}": leave_case(name) for name in RESHARDED},
    "changed-inputs": changed_inputs_case,
    "unshared": unshared_case,
    "adapter-only": adapter_only_case,
    **{f"bf16-{stage}": bf16_resume(stage) for stage in (0, 1, 2, 3)},
    "offload": offloaded_resume_case,
}

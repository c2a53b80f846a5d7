"""Checkpoints that are complete or do not count.

    checkpoints/step-00000100/
        engine/            DeepSpeed's files: weights (adapter only with LoRA) and optimizer
        round.parquet      the round in progress, so that the steps after it train on the same tokens
        recipe.yaml        of the run that wrote it
        state.json         step, ranks, ZeRO stage, data fingerprint
        COMPLETE           written last, after every rank has confirmed; without it the folder is ignored

Everything is written into a temporary folder first and renamed. There is no RNG state and no data cursor to keep: both
are functions of (seed, step, rank).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import UserError

if TYPE_CHECKING:
    from ssgen_ds.distributed import World

MARKER = "COMPLETE"
ENGINE_TAG = "engine"


@dataclass(frozen=True)
class TrainState:
    """What a resumed run needs besides the engine's own state."""

    step: int  # optimizer steps finished
    round: int  # 1-based number of the round that the last step trained on
    data_fingerprint: str
    world_size: int
    zero_stage: int


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    round_file: Path | None,
    *,
    adapter_only: bool,
    keep: int,
    world: World,
) -> Path:
    """Write one checkpoint on all ranks; older ones beyond `keep` are removed only once this one is complete."""
    final = checkpoint_dir(run_dir, state.step)
    partial = final.with_name(f".partial-{final.name}")
    needed = _bytes_on_disk(engine, adapter_only)
    world.together(lambda: _check_space(run_dir, needed))

    def prepare() -> None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finish() -> None:
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        shutil.copyfile(run_dir / "recipe.yaml", partial / "recipe.yaml")
        if round_file is not None:
            shutil.copyfile(round_file, partial / "round.parquet")
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            _fsync(file)
        marker = partial / MARKER
        marker.write_text(json.dumps({"step": state.step}), encoding="utf-8")
        _fsync(marker)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _fsync(final.parent)
        for old in complete_checkpoints(run_dir)[keep:]:
            (old / MARKER).unlink()  # first: a removal that is cut short must not look complete
            shutil.rmtree(old)

    world.together(prepare)
    with world.phase("shard"):
        engine.save_checkpoint(str(partial), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=adapter_only)
    world.phases.tick("written")
    world.barrier()
    with world.phase("publish"):
        world.together(lambda: finish() if world.is_main else None)
    return final


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    return [path for path in found if (path / MARKER).is_file()]


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (auto | never | PATH) means, or None to start at step 0."""
    if resume == "never":
        return None
    if resume == "auto":
        return next(iter(complete_checkpoints(run_dir)), None)
    path = Path(resume)
    if not (path / MARKER).is_file():
        candidates = complete_checkpoints(path) if path.is_dir() else []
        if not candidates:
            raise UserError(f"resume: {resume} is not a complete checkpoint (no {MARKER} in it)")
        return candidates[0]
    return path


def read_state(path: Path) -> TrainState:
    """The train state of a complete checkpoint."""
    return TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def check_resumable(path: Path, saved: TrainState, now: TrainState) -> None:
    """Optimizer shards fit the ranks and the ZeRO stage that wrote them; the examples must be the same."""
    for what, was, is_now in (
        ("ranks", saved.world_size, now.world_size),
        ("ZeRO stage", saved.zero_stage, now.zero_stage),
        ("data", saved.data_fingerprint, now.data_fingerprint),
    ):
        if was != is_now:
            raise UserError(
                f"resume: {path} was written with {what} = {was}, this run has {is_now}; "
                f"start it with {what} = {was}, or give another output_dir"
            )


def load_engine(engine: Any, path: Path, *, adapter_only: bool) -> None:
    """Weights and optimizer from a complete checkpoint; every trainable parameter must be in it."""
    loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE_TAG, load_module_strict=not adapter_only)
    if loaded is None:
        raise UserError(f"resume: {path} has no readable engine state; remove it to fall back to an older one")


def _bytes_on_disk(engine: Any, adapter_only: bool) -> int:
    """Size of the whole checkpoint: weights, and float32 weights with two moments for what is trained."""
    weights = trained = 0
    for parameter in engine.module.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 numel() counts the placeholder
        trained += 12 * numel if parameter.requires_grad else 0
        weights += parameter.element_size() * numel if parameter.requires_grad or not adapter_only else 0
    return weights + trained


def _check_space(run_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"no disk space for a checkpoint: {run_dir} has {free / 2**30:.2f} GiB free, "
            f"{needed / 2**30:.2f} GiB are needed; free some, or lower checkpoint.keep"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

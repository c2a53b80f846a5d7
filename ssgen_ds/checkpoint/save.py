"""Checkpoints that are complete or do not count.

    checkpoints/step-00000100/
        shard-00000-of-00002.safetensors     one a rank: its part of the weights (adapter only with LoRA) and moments
        round.parquet      the round in progress, so that the steps after it train on the same tokens
        recipe.yaml        of the run that wrote it
        state.json         step, data and tokenizer fingerprints, skipped updates, ranks, versions
        index.json         size and SHA-256 of each file above
        COMPLETE           written last, after every rank has confirmed; without it the folder does not count

Everything is written into a temporary folder, synced, and renamed. Any number of ranks and any ZeRO stage read what
any other wrote. There is no RNG state and no data cursor to keep: both are functions of (seed, step, rank).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.checkpoint.shard_file import FileEntry, ShardReader, write_shard
from ssgen_ds.errors import UserError
from ssgen_ds.run.files import publish
from ssgen_ds.run.index_file import leaving
from ssgen_ds.run.layout import (
    CHECKPOINT_NAME,
    CHECKPOINTS_FOLDER,
    INDEX,
    MARKER,
    PARTIAL,
    RECIPE_FILE,
    ROUND,
    SHARDS,
    STATE,
    checkpoint_dir,
)

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World


@dataclass(frozen=True)
class TrainState:
    """What a resumed run needs in addition to weights and moments."""

    step: int  # optimizer steps finished
    round: int  # 1-based number of the round that the last step trained on
    data_fingerprint: str
    tokenizer_fingerprint: str
    world_size: int
    zero_stage: int
    packages: dict[str, str | None]  # versions of the libraries that computed it
    skipped: int = 0  # updates left out because the loss or the gradient was not finite
    skipped_in_row: int = 0  # skipped updates in a row up to the last step
    micro_batch: dict[str, Any] | None = (
        None  # what `auto` chose, see training/micro_batch.py; None: a number, or an older run
    )


@dataclass(frozen=True)
class Saved:
    """What a checkpoint that has just become complete cost."""

    seconds: float  # time in which training waited for it
    nbytes: int  # bytes of all shards


# -- writing -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    round_file: Path | None,
    *,
    keep: int,
    world: World,
    spared: int | None = None,
) -> Saved:
    """Write one checkpoint on all ranks; older ones beyond `keep` are removed only once this one is complete.

    `spared`: the step of one that stays whatever its age; rank 0's word counts.

    Raises UserError on all ranks when one of them cannot write; what was complete before stays.
    """
    from ssgen_ds.checkpoint.fragments import Fragments

    began = time.perf_counter()
    final = checkpoint_dir(run_dir, state.step)
    partial = final.with_name(f"{PARTIAL}{final.name}")
    fragments = Fragments(engine)
    needed = int(world.sum(fragments.nbytes / (world.size if fragments.is_replicated else 1))[0])
    shard = partial / f"shard-{world.rank:05d}-of-{world.size:05d}.safetensors"

    def write() -> FileEntry:
        with world.phase("shard"):
            entry = write_shard(shard, fragments.parts(world.rank, world.size))
        world.phases.tick("written")
        return entry

    def publish() -> None:
        if world.is_main:
            with world.phase("publish"):
                _publish(partial, final, run_dir, state, round_file, entries)
                _remove_old(run_dir, keep, spared)

    try:
        world.together(lambda: _make_room(run_dir, partial, needed) if world.is_main else None)
        entries = dict(world.gather((shard.name, world.together(write))))
        world.together(publish)
    except UserError as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        last = next(iter(complete_checkpoints(run_dir)), None)
        kept = f"{last} is complete: start again to go on from it" if last else "there is no earlier one"
        raise UserError(f"the checkpoint of step {state.step} was not written; {kept}\n{error}") from None
    return Saved(time.perf_counter() - began, sum(entry.size for entry in entries.values()))


def _make_room(run_dir: Path, partial: Path, needed: int) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in partial.parent.glob(f"{PARTIAL}*"):  # left by interrupted writes
        shutil.rmtree(stale)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"no disk space for a checkpoint: {run_dir} has {free / 2**30:.2f} GiB free, "
            f"{needed / 2**30:.2f} GiB are needed; free some, or lower checkpoint.keep"
        )
    partial.mkdir()


def _publish(
    partial: Path,
    final: Path,
    run_dir: Path,
    state: TrainState,
    round_file: Path | None,
    shards: dict[str, FileEntry],
) -> None:
    """Everything but the shards, then the marker, then the name that counts. Rank 0, when all shards are on disk."""
    entries = dict(shards)
    (partial / STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    shutil.copyfile(run_dir / RECIPE_FILE, partial / RECIPE_FILE)
    if round_file is not None:
        shutil.copyfile(round_file, partial / ROUND)
    for file in (partial / STATE, partial / RECIPE_FILE, partial / ROUND):
        if file.is_file():
            entries[file.name] = FileEntry.of(file)
    index = json.dumps({"files": {name: asdict(entry) for name, entry in sorted(entries.items())}}, indent=2)
    (partial / INDEX).write_text(index, encoding="utf-8")
    (partial / MARKER).write_text(json.dumps({"step": state.step, **asdict(FileEntry.of(partial / INDEX))}), "utf-8")
    publish(partial, final)


def _remove_old(run_dir: Path, keep: int, spared: int | None) -> None:
    for old in complete_checkpoints(run_dir)[keep:]:
        if spared is not None and old == checkpoint_dir(run_dir, spared):
            continue
        (old / MARKER).unlink()  # first: a removal that is cut short must not look complete
        shutil.rmtree(old)


# -- finding -----------------------------------------------------------------------------------------------------------


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Folders with a marker, newest first; whether their files are whole is `problems_of`'s question."""
    return [path for path in candidates(run_dir) if (path / MARKER).is_file()]


def candidates(run_dir: Path) -> list[Path]:
    """All that look like checkpoints, newest first; what has another name is not ours."""
    found = (run_dir / CHECKPOINTS_FOLDER).glob("step-*")
    return sorted((path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()), reverse=True)


def problems_of(path: Path, world: World | None = None) -> list[str]:
    """What is broken in a checkpoint, on every rank the same; [] when every file is as it was written.

    The ranks share the work; without a world this process does all of it.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    entries, problems = _read_index(path) if rank == 0 else ({}, [])
    if world is not None:
        entries, problems = world.broadcast((entries, problems))
    if problems:
        return problems
    mine = [entry.problem(path / name) for name, entry in sorted(entries.items())[rank::size]]
    everybody = [mine] if world is None else world.gather(mine)
    return [problem for one in everybody for problem in one if problem]


def _read_index(path: Path) -> tuple[dict[str, FileEntry], list[str]]:
    """Files by name, and what is wrong with the index itself."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if problem := FileEntry(marker["size"], marker["sha256"]).problem(path / INDEX):
            return {}, [problem]
        files = json.loads((path / INDEX).read_text(encoding="utf-8"))["files"]
        if outside := leaving(files):
            return {}, [f"{path / INDEX}: names {outside[0]!r}, which is no file of the checkpoint"]
        return {name: FileEntry(**entry) for name, entry in files.items()}, []
    except FileNotFoundError:
        return {}, [f"{path / MARKER}: missing, so the checkpoint is not complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [f"{path / MARKER}: unreadable ({type(error).__name__}: {error})"]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> TrainState:
    """The train state of a complete checkpoint."""
    try:
        return TrainState(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / STATE}: not what this version of ssgen-ds writes: {error}") from None


def load_engine(engine: Any, path: Path, world: World) -> None:
    """Weights and optimizer states from a checkpoint of any number of ranks and any ZeRO stage."""
    from ssgen_ds.checkpoint.fragments import Fragments

    fragments = Fragments(engine)
    names = world.broadcast(sorted(file.name for file in path.glob(SHARDS)))  # a stale rank may see fewer, and waits

    def load() -> None:
        with ShardReader([path / name for name in names]) as reader:
            try:
                fragments.load(reader)
            except UserError as error:
                raise UserError(f"resume: {path}: {error}") from None

    world.together(load)
    fragments.publish()


@contextmanager
def open_weights(path: Path) -> Iterator[ShardReader]:
    """The weights that were trained, to be read one by one. Raises UserError naming what is broken."""
    if problems := problems_of(path):
        raise UserError.from_list(f"{path} cannot be used", problems)
    with ShardReader(sorted(path.glob(SHARDS))) as reader:
        yield reader

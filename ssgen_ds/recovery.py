"""Which checkpoint a run goes on from: the newest whole one, agreed by all ranks; never silently step 0."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssgen_ds.checkpoint import MARKER, STATE, TrainState, candidates, problems_of
from ssgen_ds.errors import UserError

if TYPE_CHECKING:
    from ssgen_ds.distributed import World

log = logging.getLogger(__name__)


def find_checkpoints(run_dir: Path, resume: str) -> list[Path]:
    """What `resume` (auto | never | PATH of a checkpoint or run) means, newest first; [] to start at step 0.

    It is said of a job's first start: one that was started again by SLURM or torchrun goes on from its own.
    """
    if is_restart() and (own := candidates(run_dir)):
        return own
    if resume == "never":
        return []
    if resume == "auto":
        return candidates(run_dir)
    path = Path(resume)
    if (path / STATE).is_file() or (path / MARKER).is_file():
        return [path]
    found = candidates(path)
    if not found:
        raise UserError(f"resume: {resume} is neither a checkpoint nor a run with one")
    return found


def choose_checkpoint(found: list[Path], run_dir: Path, world: World) -> Path | None:
    """The first whole one of `found` (rank 0's list counts), every file checked by its hash, shared out to the ranks.

    Broken ones are named; those of this run are renamed out of the way. Raises UserError when there are checkpoints
    and none is whole: step 0 is never a fallback.
    """
    found = world.broadcast(found)
    broken: dict[Path, list[str]] = {}
    for path in found:
        broken[path] = problems_of(path, world)
        if not broken[path]:
            break
    if broken and not all(broken.values()):
        used = broken.popitem()[0]
        world.together(lambda: _set_aside(broken, used, run_dir) if world.is_main else None)
        return used
    if broken:
        raise UserError.from_list(
            f"no checkpoint in {found[0].parent} can be used; nothing was changed. Restore the files, or begin again "
            "at step 0 in another output_dir",
            [problem for problems in broken.values() for problem in problems],
        )
    return None


def is_restart() -> bool:
    """Whether SLURM has requeued this job, or torchrun has started its ranks again."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _set_aside(broken: dict[Path, list[str]], used: Path, run_dir: Path) -> None:
    for path, problems in broken.items():
        log.warning("%s is broken: %s", path, "; ".join(problems))
        if path.parent.parent == run_dir:  # it must not count when old ones are removed
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    if broken:
        log.warning("going on from %s", used)
    later = [path for path in candidates(run_dir) if path.name > used.name]
    for path in later if used.parent.parent.resolve() == run_dir.resolve() else []:
        left = path.with_name(f"left-{path.name}")  # the new ones of these steps must not count as older than it
        shutil.rmtree(left, ignore_errors=True)
        os.rename(path, left)
        log.warning("%s comes after it: renamed to %s", path, left.name)


def check_resumable(path: Path, saved: TrainState, now: TrainState, say: Callable[[str], None]) -> TrainState:
    """The state to go on with. Examples and tokens must be the same; what else differs is said.

    Raises UserError for another tokenizer or other data.
    """
    for what, was, is_now in (
        ("tokenizer", saved.tokenizer_fingerprint, now.tokenizer_fingerprint),
        ("data", saved.data_fingerprint, now.data_fingerprint),
    ):
        if was != is_now:
            raise UserError(
                f"resume: {path} was trained with another {what} (fingerprint {was[:12]}, now {is_now[:12]}): "
                f"the run would not be the same; restore the {what}, or give another output_dir"
            )
    for what, was, is_now in (
        ("ranks", saved.world_size, now.world_size),
        ("ZeRO stage", saved.zero_stage, now.zero_stage),
        *((f"{name}", version, now.packages.get(name)) for name, version in saved.packages.items()),
    ):
        if was != is_now:
            say(f"warning: {path} was written with {what} {was}, now {is_now}: equal up to rounding, not to the bit")
    return replace(saved, world_size=now.world_size, zero_stage=now.zero_stage, packages=now.packages)

"""Which checkpoint a run resumes from: all ranks agree on the newest whole one; never silently step 0."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.checkpoint.save import TrainState, candidates, problems_of
from ssgen_ds.distributed.launch import is_restart
from ssgen_ds.errors import UserError
from ssgen_ds.run.layout import MARKER, STATE

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World

log = logging.getLogger(__name__)
Say = Callable[[str], None]


def find_checkpoints(run_dir: Path, resume: str) -> list[Path]:
    """What `resume` (auto | never | PATH of a checkpoint or run) means, newest first; [] to start at step 0.

    `resume` holds for a job's first start. A job that SLURM or torchrun has started again uses its own checkpoints.
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
    """The first whole checkpoint of `found`, rank 0's list. The ranks share the work of checking files by their hash.

    Broken checkpoints are named; those of this run are renamed, so that they no longer count. Raises UserError when
    there are checkpoints and none is whole: step 0 is never a fallback.
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


def check_resumable(path: Path, saved: TrainState, now: TrainState, say: Say) -> TrainState:
    """The state to resume with. Data and tokenizer must be the same; other differences are warned of.

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
    differences: tuple[tuple[str, Any, Any], ...] = (
        ("ranks", saved.world_size, now.world_size),
        ("ZeRO stage", saved.zero_stage, now.zero_stage),
        *((f"{name}", version, now.packages.get(name)) for name, version in saved.packages.items()),
    )
    for what, had, has in differences:
        if had != has:
            say(f"warning: {path} was written with {what} {had}, now {has}: equal up to rounding, not bitwise")
    return replace(saved, world_size=now.world_size, zero_stage=now.zero_stage, packages=now.packages)

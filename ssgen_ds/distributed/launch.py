"""What every entry point shares: launcher arguments, exit codes, one message instead of a traceback."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from ssgen_ds.distributed.streams import steady
from ssgen_ds.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    NonFiniteError,
    NotPublished,
    RankError,
    RankLost,
    StopRequested,
    UserError,
)

T = TypeVar("T")


def split_arguments(arguments: list[str], usage: str, expected: int) -> tuple[list[str], list[str]]:
    """Positional arguments and key=value overrides; `--local_rank` (the deepspeed launcher's) is accepted."""
    rest = drop_local_rank(arguments)
    options = [item for item in rest if item.startswith("-")]
    overrides = [item for item in rest if "=" in item and not item.startswith("-")]
    positional = [item for item in rest if item not in overrides and not item.startswith("-")]
    if options or len(positional) != expected:
        raise UserError(f"usage: {usage}" + (f"; unknown option {options[0]}" if options else ""))
    return positional, overrides


def drop_local_rank(arguments: list[str]) -> list[str]:
    """Arguments without `--local_rank N` in any spelling; it also fills LOCAL_RANK where the launcher did not."""
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        name, _, value = item.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value or next(items, "0"))
        else:
            rest.append(item)
    return rest


def guarded(work: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run an entry point and leave with an exit code of docs/clusters.md: 0, 2 (user), 75 (stopped), 1 (other)."""
    steady()
    quiet_libraries()
    set_allocator()
    try:
        work(arguments)
    except UserError as error:
        _leave(EXIT_USER_ERROR, f"error: {error}", speak=isinstance(error, RankError))
    except StopRequested as stopped:
        _leave(EXIT_STOPPED, str(stopped))
    except (NonFiniteError, NotPublished) as error:
        _leave(EXIT_FAILURE, f"error: {error}")
    except RankLost as lost:
        print(f"error: {lost}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        _leave(EXIT_FAILURE, "interrupted")
    sys.exit(EXIT_OK)


def _leave(code: int, message: str, speak: bool = False) -> None:
    if speak or is_first_rank():  # the others say the same
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def quiet_libraries() -> None:
    """What is left to read on a normal run is ours: info from rank 0, and warnings and above from everybody.

    Call it before the libraries are imported. Their bars come back with HF_HUB_DISABLE_PROGRESS_BARS=0.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("ssgen_ds").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    # Says on every import that an optional package for 4-bit inference on CPUs is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # The libraries call each other by names that are about to change; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)\.")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also those of transformers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def set_allocator() -> None:
    """Let torch's memory on a GPU grow in place; call it before torch is imported. What a user has set is left alone.

    Generation and training take blocks of ever other sizes in turn: in segments of fixed size each would leave holes
    that the other cannot use.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def is_first_rank() -> bool:
    """Whether this process speaks for all, known before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def launched_ranks() -> int:
    """How many ranks the launcher has started, known before any process group exists; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def before_meeting(check: Callable[[], T]) -> T:
    """The result of a check that needs no torch, made before the ranks meet. Raises its UserError on all ranks."""
    try:
        return check()
    except UserError as problem:
        if launched_ranks() == 1:
            raise
        from ssgen_ds.distributed.process_group import refuse_together

        refuse_together(problem)


def is_restart() -> bool:
    """Whether SLURM has requeued this job, or torchrun has started its ranks again."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))

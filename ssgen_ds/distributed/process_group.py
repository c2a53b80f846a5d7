"""Start and end of the process group.

Works under `deepspeed`, `torchrun`, `srun` and alone. Tensors travel on the device's own backend; flags and Python
objects on a gloo group, so that they never wait for the GPU stream.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from ssgen_ds.distributed.compile_lock import without_stale_locks
from ssgen_ds.distributed.phases import Phases, phases_from_environment
from ssgen_ds.distributed.rendezvous import Place, join
from ssgen_ds.distributed.rendezvous_store import torch_store
from ssgen_ds.distributed.signals import StopFlag, shielded_children
from ssgen_ds.distributed.slurm_env import map_slurm
from ssgen_ds.distributed.watchdog import Watchdog
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import EXIT_FAILURE, NonFiniteError, RankError, RankLost, StopRequested, UserError
from ssgen_ds.recipe.schema import RecoveryConfig

_BACKEND_SLACK = 60.0  # seconds
_DRIVER = Path("/proc/driver/nvidia/version")
_END_SECONDS = 10.0  # limit for the group to end, and for the process if the group does not
_REFUSAL_SECONDS = 30.0  # how long a rank with a problem waits for rank 0, to tell it


def refuse_together(problem: UserError) -> NoReturn:
    """Raise on every rank what keeps this one from taking part; the others wait where they meet and would not know."""
    place, _ = _place()
    if place.size > 1:
        try:
            join(replace(place, problem=str(problem)), _REFUSAL_SECONDS)
        except UserError as told:
            if str(told) == str(problem):
                raise  # all have it, rank 0 speaks
            # Not all have it, or nobody is there to tell: it is shown on this node, too.
            raise RankError(str(told) if str(problem) in str(told) else str(problem)) from None
    raise problem


def _place() -> tuple[Place, bool]:
    """Where the launcher has put this rank, and whether it has a GPU; a process without launcher is alone."""
    map_slurm()
    env = os.environ
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    rank, size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    local_size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size)))  # LOCAL_SIZE is deepspeed's
    on_gpu = torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu"
    gpus = torch.cuda.device_count() if on_gpu else 0
    is_own = 0 < gpus < local_size  # each rank sees its own GPUs only, as with srun --gpus-per-task=1 or --gpu-bind
    if is_own:
        env["LOCAL_RANK"] = str(local_rank % gpus)  # DeepSpeed takes it for the number of the device
    gpu = _gpu_id(local_rank % gpus) if is_own else ""
    return Place(rank, size, local_rank, local_size, gpus, socket.gethostname(), gpu, _hidden_gpus()), on_gpu


def _hidden_gpus() -> str:
    """Why a host with NVIDIA's driver shows torch no GPU, and what to do; "" where it does, or none is asked for.

    Otherwise the run would go on on the CPU, a hundred times slower, and nobody would be told.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or torch.cuda.is_available() or not _DRIVER.exists():
        return ""
    or_not = "or set DS_ACCELERATOR=cpu to train on the CPU"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return f"CUDA_VISIBLE_DEVICES={shown!r} shows no GPU: unset it, name some that `nvidia-smi -L` lists, {or_not}"
    built = torch.version.cuda or "no CUDA: the CPU build"
    return (
        f"there is an NVIDIA driver, but torch ({built}) sees no GPU: install a torch built for the CUDA that "
        f"`nvidia-smi` shows, {or_not}"
    )


@contextmanager
def process_group(limits: RecoveryConfig | None = None, stop: StopFlag | None = None) -> Iterator[World]:
    """Join the process group and leave it, also on errors. `stop` is set when any rank was asked to stop.

    A rank that fails tells the others, so that they end with its message rather than with broken connections. It does
    not leave the group: NCCL's end waits by design for collectives that the others will never join.
    """
    limits, stop, launched = limits or RecoveryConfig(), stop or StopFlag(), "SLURM_PROCID" in os.environ
    launched = launched or "RANK" in os.environ
    place, on_gpu = _place()
    rank, size, local_rank = place.rank, place.size, place.local_rank
    meeting = join(place, limits.rendezvous)
    phases = phases_from_environment(rank)
    own_store = None if meeting.store is None else meeting.store.another(limits.rendezvous)
    watchdog = Watchdog(rank, size, local_rank, place.host, own_store, phases, stop, limits, launched)
    watchdog.start()
    is_joint = False  # whether all ranks end together
    try:
        device = _device(on_gpu, local_rank % max(1, place.gpus), place.local_size)
        with shielded_children(), without_stale_locks():  # an operator may be compiled
            store = torch_store(meeting, rank, size, limits.rendezvous)
            control = _init_backend(store, place, device, limits.collective_timeout, phases)
        yield World(rank, local_rank, size, device, control, phases, stop, watchdog)
        is_joint = True
    except RankError as error:
        watchdog.fail(f"rank {rank} on {place.host}: {error}")
        raise
    except (UserError, StopRequested, NonFiniteError):
        is_joint = True  # all ranks raise it together
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        _end_with_the_others(error, watchdog, place)
        raise
    finally:
        watchdog.close()
        if dist.is_initialized() and (is_joint or size == 1):
            _leave_group()
        elif dist.is_initialized():
            faulthandler.dump_traceback_later(_END_SECONDS, exit=True)  # if what is left behind keeps the process
        meeting.close()


def _leave_group() -> None:
    """NCCL's end blocks after a failure, by design. Then this process still says what it has to say, and ends."""
    leaving = threading.Thread(target=dist.destroy_process_group, name="ssgen-leave", daemon=True)
    leaving.start()
    leaving.join(_END_SECONDS)
    if leaving.is_alive():
        faulthandler.dump_traceback_later(_END_SECONDS, exit=True)


def _gpu_id(index: int) -> str:
    """Tells GPUs apart; "" when CUDA has no answer, then the same error comes up where all ranks are told."""
    try:
        return str(torch.cuda.get_device_properties(index).uuid)
    except (RuntimeError, AttributeError):
        return ""


def _device(on_gpu: bool, index: int, local_size: int) -> torch.device:
    if on_gpu:
        device = torch.device("cuda", index)
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)  # the first use: before it CUDA has not looked at the GPU
        except RuntimeError as error:
            told = str(error).strip().splitlines()[0]
            raise RankError(
                f"GPU {index} of {socket.gethostname()} cannot be used: {told}; `nvidia-smi` shows what runs on it, "
                "which in exclusive mode is one process"
            ) from None
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.device("cpu")


def _init_backend(
    store: dist.Store, place: Place, device: torch.device, timeout_seconds: float, phases: Phases
) -> dist.ProcessGroup:
    """torch's default group and DeepSpeed's view of it; returns the control group.

    The watchdog ends first where a collective hangs: the backend's own error knows this rank only, and not the phase.
    The control group's own limit is far away: rank 0 may tokenize or convert for long while the others wait there, and
    the watchdog knows a rank that works from one that hangs.
    """
    import deepspeed  # late: it reads DS_ACCELERATOR when imported

    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds + _BACKEND_SLACK)
    with redirect_stdout(io.StringIO()), _no_shared_memory():  # on a CPU it prints which operator it has built
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        phases.tick("meet")
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    dist.barrier(group=control)
    return control


@contextmanager
def _no_shared_memory() -> Iterator[None]:
    """On a CPU and by LOCAL_SIZE alone, DeepSpeed makes 68 MiB in /dev/shm a rank for a reduction of its inference
    engine, never takes them back, and waits for the other ranks' in a loop that lets no other thread run: no watchdog
    could end a rank whose peer was killed there. Nothing here uses that reduction."""
    local_size = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if local_size is not None:
            os.environ["LOCAL_SIZE"] = local_size


def _end_with_the_others(error: BaseException, watchdog: Watchdog, place: Place) -> None:
    """Whose fault is it? A broken connection is that of a rank that has left; anything else is this rank's own."""
    where = f"rank {place.rank} on {place.host}, {watchdog.phases.failed_in or watchdog.phases.place}"
    text = f"{where}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
        gone = watchdog.blame()
        if verdict := watchdog.verdict():  # that rank's traceback is the one to read
            raise SystemExit(EXIT_FAILURE) from RankLost(verdict)
        text = f"{gone} ({where})" if gone else text
        watchdog.fail(text)
        watchdog.last_words(text)
        raise RankLost(text) from None
    watchdog.fail(text)
    watchdog.last_words(text)


_BROKEN = re.compile(r"closed by peer|reset by peer|Connection refused|Broken pipe|remote process exited|Socket", re.I)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

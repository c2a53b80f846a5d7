"""Start and end of the process group, and the few decisions that all ranks must share.

Works under `deepspeed`, `torchrun`, `srun` (SLURM_* are mapped here) and alone. Tensors travel on the device's own
backend; flags and Python objects on a gloo group, so that they never wait for the GPU stream.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ssgen_ds.compile_lock import without_stale_locks
from ssgen_ds.config import RecoveryConfig
from ssgen_ds.errors import EXIT_FAILURE, NonFiniteError, RankError, RankLost, StopRequested, UserError
from ssgen_ds.memory import PeakMemory
from ssgen_ds.phases import Phases, phases_from_environment
from ssgen_ds.rendezvous import Place, connect, join
from ssgen_ds.signals import StopFlag, shielded_children
from ssgen_ds.watchdog import Watchdog

T = TypeVar("T")
_BACKEND_SLACK = 60.0  # seconds
_REFUSAL_SECONDS = 30.0  # that a rank with a problem waits for rank 0, to tell it


@dataclass(frozen=True)
class World:
    """This rank's place, its device, and what it is doing."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    phases: Phases = field(default_factory=Phases)
    stop: StopFlag = field(default_factory=StopFlag)
    watchdog: Watchdog | None = None
    memory: PeakMemory = field(default_factory=PeakMemory)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Be in this phase of the (1-based) step inside, and measure its memory; see `phases.py` and `memory.py`."""
        with self.phases.enter(name, step), self.memory.of(name):
            yield

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set on some rank."""
        value = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(item) for item in value.tolist()]

    def sum(self, *values: float) -> list[float]:
        """Float64 sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.control)
        return float(total.item())

    def gather(self, item: T) -> list[T]:
        """One Python object from every rank, on every rank, in rank order."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def broadcast(self, item: T) -> T:
        """Rank 0's object on every rank."""
        box: list[Any] = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it is refused on one, all raise the same error instead of waiting for ever."""
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"rank {self.rank} on {socket.gethostname()}: {error}"
        problems = list(dict.fromkeys(item for item in self.gather(problem) if item))
        if problems:
            raise UserError("\n".join(problems))
        return result  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """Rank 0 works first (it fills caches), then the others; errors as in `together`."""
        first = self.together(lambda: work() if self.is_main else None)
        rest = self.together(lambda: None if self.is_main else work())
        return first if self.is_main else rest  # type: ignore[return-value]


def map_slurm() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from an `srun` step's environment.

    Only inside `srun` (SLURM_STEP_NODELIST): the batch script itself also sees SLURM_PROCID, always 0.
    """
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(_slurm_counts(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])
    env.setdefault("MASTER_ADDR", _first_slurm_host(env["SLURM_STEP_NODELIST"]))
    # Jobs that share a node must not share a port, nor take one that the system gives to connections (from 32768 on).
    env.setdefault("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000))


def _slurm_counts(text: str) -> list[int]:
    """One number a node: `4(x2),3` is 4, 4, 3."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _first_slurm_host(nodes: str) -> str:
    """Of `gpu[07-08,12],login1` gpu07; scontrol would know, but a container rarely has it."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


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
    gpu = _gpu_id(local_rank % gpus) if 0 < gpus < local_size else ""
    return Place(rank, size, local_rank, local_size, gpus, socket.gethostname(), gpu), on_gpu


@contextmanager
def process_group(limits: RecoveryConfig | None = None, stop: StopFlag | None = None) -> Iterator[World]:
    """Join the process group and leave it, also on errors. `stop` is set when any rank was asked to stop.

    A rank that fails tells the others, so that they end with its message rather than with broken connections.
    """
    limits, stop, launched = limits or RecoveryConfig(), stop or StopFlag(), "SLURM_PROCID" in os.environ
    launched = launched or "RANK" in os.environ
    place, on_gpu = _place()
    rank, size, local_rank = place.rank, place.size, place.local_rank
    store = join(place, limits.rendezvous)
    phases = phases_from_environment(rank)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own_store = dist.PrefixStore(f"ssgen/watch/{attempt}", connect(place, limits.rendezvous)) if size > 1 else None
    watchdog = Watchdog(rank, size, local_rank, place.host, own_store, phases, stop, limits, launched)
    watchdog.start()
    try:
        device = _device(on_gpu, local_rank % max(1, place.gpus), place.local_size)
        with shielded_children(), without_stale_locks():  # an operator may be compiled
            control = _init_backend(store, place, device, limits.collective_timeout)
        yield World(rank, local_rank, size, device, control, phases, stop, watchdog)
    except RankError as error:
        watchdog.fail(f"rank {rank} on {place.host}: {error}")
        raise
    except (UserError, StopRequested, NonFiniteError, KeyboardInterrupt, SystemExit):
        raise  # all ranks raise it together
    except BaseException as error:
        _end_with_the_others(error, watchdog, place)
        raise
    finally:
        watchdog.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _gpu_id(index: int) -> str:
    """Tells GPUs apart; "" when CUDA has no answer, then the same error comes up where all ranks are told."""
    try:
        return str(torch.cuda.get_device_properties(index).uuid)
    except (RuntimeError, AttributeError):
        return ""


def _device(on_gpu: bool, index: int, local_size: int) -> torch.device:
    if on_gpu:
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.device("cpu")


def _init_backend(store: dist.Store, place: Place, device: torch.device, timeout_seconds: float) -> dist.ProcessGroup:
    """torch's default group and DeepSpeed's view of it; returns the control group.

    The watchdog ends first where a collective hangs: the backend's own error knows this rank only, and not the phase.
    The control group's own limit is far away: rank 0 may tokenize or convert for long while the others wait there, and
    the watchdog knows a rank that works from one that hangs.
    """
    import deepspeed  # late: it reads DS_ACCELERATOR when imported

    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds + _BACKEND_SLACK)
    with redirect_stdout(io.StringIO()):  # on a CPU it prints which operator it has built
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    dist.barrier(group=control)
    _unname_shared_memory(place.rank)
    return control


def _unname_shared_memory(rank: int) -> None:
    """On a CPU DeepSpeed gives each rank 68 MiB in /dev/shm and never takes them back: memory that is gone until the
    machine restarts. All ranks have mapped them by now; without a name they go with the last rank, killed or not."""
    owner = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{owner}").unlink(missing_ok=True)


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


def keep_freed_memory() -> None:
    """Make glibc reuse freed tensors instead of handing every large one back to the system.

    Each gather under ZeRO-3 allocates and frees all weights; mapping them anew costs a page fault every 4 KiB. Measured
    on two ranks of SmolLM2-135M in float32, third and fourth step of two runs: 8.6-10.2 s instead of 10.6-14.3, for
    a fifth to a third more resident memory: worth it under ZeRO-3 only.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 * 2**20)):
        libc.mallopt(option, value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Meeting of the ranks before anything heavy: a dead host, a missing or doubled rank and uneven nodes are found here.

Every rank tells the store of rank 0 who it is; rank 0 looks at all of them and
answers once. So a wrong launch ends on every rank with the same message, within seconds instead of a default timeout.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from ssgen_ds.distributed.job_secret import SECRET_VARIABLE, job_secret
from ssgen_ds.distributed.job_store import JobStore, NoStore, StoreLost, WrongSecret, connect_within
from ssgen_ds.distributed.rendezvous_store import Meeting, PortInUse, find_door, leave_door, listen, serve
from ssgen_ds.errors import RankError, UserError

_RETRY_SECONDS = 0.5
_HEARD_SECONDS = 10.0
_GRACE_SECONDS = 10.0  # how long others may take to come once a rank has come with a problem
_ANSWER_SECONDS = 30.0  # on top of the limit: rank 0 answers after it has waited that long for the others


@dataclass(frozen=True)
class Place:
    """One rank as its launcher placed it."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node
    gpus: int  # visible to this rank; 0 on a CPU
    host: str
    gpu: str = ""  # the id of its own, where fewer are visible than there are ranks on the node
    problem: str = ""  # why this rank cannot take part: its recipe is wrong, or its GPU hidden


def join(place: Place, seconds: float) -> Meeting:
    """Meet all ranks at MASTER_ADDR:MASTER_PORT; the store that they share from then on.

    Raises UserError, on every rank that got as far as the store the same one, when not all have come within `seconds`
    or when they do not fit together.
    """
    if place.size == 1:
        if place.problem:
            raise UserError(place.problem)
        return Meeting(None)
    meeting = _open(place, seconds)
    store = meeting.store
    assert store is not None
    try:
        _introduce(store, place, seconds)
    except StoreLost as error:
        meeting.close()
        raise RankError(_at(place, f"rank 0 has gone while the ranks met ({error})")) from None
    except BaseException:
        meeting.close()
        raise
    store.patience = None
    return meeting


def _introduce(store: JobStore, place: Place, seconds: float) -> None:
    store.patience = _ANSWER_SECONDS
    if store.add(f"came/{place.rank}", 1) > 1:
        raise RankError(_doubled(store, place))
    store.put(f"place/{place.rank}", json.dumps(asdict(place)))
    if place.rank == 0:
        store.put("answer", json.dumps(_examine(store, place.size, seconds)))
    (answer,) = store.get("answer", seconds=seconds + _ANSWER_SECONDS)
    if answer is None:
        raise RankError(_at(place, f"rank 0 did not answer within {seconds + _ANSWER_SECONDS:.0f} s"))
    if refusal := json.loads(answer):
        _let_all_hear(store, place)
        raise UserError(refusal)


def _let_all_hear(store: JobStore, place: Place) -> None:
    """Rank 0 takes the store away when it ends: first those that came must have the answer."""
    heard = store.add("heard", 1)
    if place.rank != 0:
        return
    came = sum(item is not None for item in store.get(*(f"place/{rank}" for rank in range(place.size))))
    deadline = time.monotonic() + _HEARD_SECONDS
    while heard < came and time.monotonic() < deadline:
        time.sleep(0.05)
        heard = store.add("heard", 0)


def _open(place: Place, seconds: float) -> Meeting:
    """Rank 0's store: served by this process, or connected to."""
    host, port, secret = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), job_secret()
    agent = _agent(place, host, port, seconds)
    _resolve(place, host, port)
    if place.rank == 0:
        try:
            meeting = serve(listen(host, 0 if agent else port, place.local_size >= place.size), secret, seconds)
        except PortInUse:
            raise UserError(
                f"port {port} is in use, perhaps by another job on this machine; name another: "
                "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N with srun"
            ) from None
        except OSError as error:
            raise RankError(_at(place, f"cannot open the rendezvous {host}:{port}: {_first_line(error)}")) from None
        if agent is not None and meeting.server is not None:
            leave_door(agent, meeting.server.address[1], secret)
        return meeting
    try:
        if agent is not None:
            port = find_door(agent, secret, seconds)
        return Meeting(connect_within((host, port), secret, seconds))
    except WrongSecret:
        raise RankError(
            _at(
                place,
                f"rank 0 at {host}:{port} has another secret of the job; set {SECRET_VARIABLE} to one ",
            )
            + "random text for all ranks (srun and sbatch hand it on), or SSGEN_CACHE to a folder that all nodes share"
        ) from None
    except (StoreLost, NoStore) as error:
        raise _unreached(place, host, port, seconds, str(error)) from None


def _agent(place: Place, host: str, port: int, seconds: float) -> dist.Store | None:
    """The store of torchrun's agent, which has MASTER_PORT; None under other launchers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    _reach(place, host, port, seconds)
    return dist.TCPStore(host, port, place.size, False, timedelta(seconds=seconds), wait_for_workers=False)


def _resolve(place: Place, host: str, port: int) -> None:
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise RankError(
            _at(place, f"the rendezvous host MASTER_ADDR={host} has no address ({error.strerror})")
            + "; give a name or an address that every node can resolve"
        ) from None


def _reach(place: Place, host: str, port: int, seconds: float) -> None:
    """Wait until a server listens; torch's own store would only say that it timed out."""
    _resolve(place, host, port)
    deadline, problem = time.monotonic() + seconds, "no answer"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _unreached(place, host, port, seconds, problem)
        try:
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _unreached(place: Place, host: str, port: int, seconds: float, problem: str) -> RankError:
    return RankError(
        _at(place, f"no rendezvous at MASTER_ADDR={host} MASTER_PORT={port} within {seconds:.0f} s ({problem})")
        + "; is rank 0 running there, may this node reach that port? recovery.rendezvous is the limit"
    )


def _examine(store: JobStore, size: int, seconds: float) -> str:
    """Rank 0's look at everybody: why they cannot train, "" when they can."""
    deadline = time.monotonic() + seconds
    came: dict[int, Place] = {}
    while len(came) < size and time.monotonic() < deadline:
        missing = sorted(set(range(size)) - set(came))
        for rank, found in zip(missing, store.get(*(f"place/{rank}" for rank in missing)), strict=True):
            if found is not None:
                came[rank] = Place(**json.loads(found))
                if came[rank].problem:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.05 * (len(came) < size))
    places = [came[rank] for rank in sorted(came)]
    if refusal := _own_problems(places):
        return refusal
    problems = misfits(places, size, seconds)
    return str(UserError.from_list("the ranks do not fit together", problems)) if problems else ""


def _own_problems(places: list[Place]) -> str:
    """What ranks came with; whose it is, unless all came with the same."""
    found = {place.problem for place in places}
    if len(found) == 1:
        return found.pop()
    return "\n".join(_at(place, place.problem) for place in places if place.problem)


def misfits(places: list[Place], size: int, seconds: float) -> list[str]:
    """One sentence for each thing that is wrong with the ranks that came within `seconds`."""
    missing = sorted(set(range(size)) - {place.rank for place in places})
    if missing:
        return [
            f"{len(missing)} of {size} ranks did not come within {seconds:.0f} s: {_ranks(missing)}; here are "
            f"{_hosts(places)}; does the launcher's number of nodes and of ranks on each fit?"
        ]
    problems = []
    sizes = sorted({place.size for place in places})
    if len(sizes) > 1:
        problems.append(f"WORLD_SIZE differs between the ranks: {', '.join(map(str, sizes))}; give every node the same")
    for host, gpus, local in sorted({(place.host, place.gpus, place.local_size) for place in places}):
        own = [place.gpu for place in places if place.host == host]  # srun --gpus-per-task=1 shows each rank its own
        if 0 < gpus < local and (not all(own) or len(set(own)) < len(own)):
            problems.append(f"{host} has {gpus} visible GPUs, but {local} ranks were started there; start {gpus}")
    counts = {place.host: place.gpus for place in places}
    if len(set(counts.values())) > 1:
        seen = ", ".join(f"{host} {count}" for host, count in sorted(counts.items()))
        problems.append(f"the nodes have different numbers of visible GPUs: {seen}; ask for equal ones")
    return problems


def _doubled(store: JobStore, place: Place) -> str:
    (found,) = store.get(f"place/{place.rank}")
    other = "another process" if found is None else Place(**json.loads(found)).host
    return _at(
        place,
        f"there is a rank {place.rank} already, on {other}; every node needs its own --node_rank, "
        "and SLURM_PROCID only tells ranks apart inside srun",
    )


def _at(place: Place, what: str) -> str:
    return f"rank {place.rank} on {place.host}: {what}"


def _hosts(places: list[Place]) -> str:
    count = Counter(place.host for place in places)
    return ", ".join(f"{number} on {host}" for host, number in sorted(count.items()))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

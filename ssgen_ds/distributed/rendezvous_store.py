"""Where the ranks meet: rank 0 opens the job's store at MASTER_ADDR:MASTER_PORT, and torch's own store through it.

Both listen on the address that MASTER_ADDR names, not on all of the machine, wherever that address is one by which the
other ranks can reach it. Alone, nothing listens. Under torchrun the port of MASTER_PORT is its agent's: there rank 0
opens another one, and leaves its number with the agent's store, signed with the job's secret.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ssgen_ds.distributed.job_store import JobStore, StoreLost, StoreServer, WrongSecret

log = logging.getLogger(__name__)

_DOOR = "ssgen/door"  # a key of the agent's store


class PortInUse(OSError):
    """Somebody else listens on the port."""


@dataclass
class Meeting:
    """The job's store as this rank has it; rank 0 has the server, too. Alone there is none."""

    store: JobStore | None
    server: StoreServer | None = None

    def close(self) -> None:
        """Rank 0 takes the store away."""
        if self.store is not None:
            self.store.close()
        if self.server is not None:
            self.server.close()


def listen(host: str, port: int, one_node: bool) -> socket.socket:
    """A socket that listens on `host` alone; on all addresses, and says so, where that is not one that others can use.

    Raises PortInUse, or OSError for another reason.
    """
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        is_named = host not in ("localhost", address[0])  # "localhost" means this machine, and all ranks are here
        if ipaddress.ip_address(address[0]).is_loopback and is_named and not one_node:
            continue  # Debian gives a machine's own name an address that other nodes do not reach
        try:
            return socket.create_server(address[:2], family=family, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse from None
    log.warning(
        "warning: MASTER_ADDR=%s is no address of this machine that other nodes can reach; the rendezvous listens on "
        "all addresses, to those who have the job's secret",
        host,
    )
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise PortInUse from None if error.errno == errno.EADDRINUSE else error


def serve(listener: socket.socket, secret: bytes, seconds: float) -> Meeting:
    """Rank 0's store, and its own connection to it."""
    server = StoreServer(listener, secret)
    host, port = server.address
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return Meeting(JobStore((host, port), secret, seconds), server)


def leave_door(agent: dist.Store, port: int, secret: bytes) -> None:
    """Tell the other ranks, through the store of torchrun's agent, which port rank 0 has opened."""
    agent.set(_door(), json.dumps([port, _signature(port, secret)]))


def find_door(agent: dist.Store, secret: bytes, seconds: float) -> int:
    """The port that rank 0 has left. Raises WrongSecret when it was not signed with this job's secret, or StoreLost."""
    try:
        agent.wait([_door()], timedelta(seconds=seconds))
        port, signature = json.loads(agent.get(_door()))
        if hmac.compare_digest(signature, _signature(port, secret)):
            return port
    except dist.DistError:
        raise StoreLost("rank 0 has not opened its store") from None
    except (ValueError, TypeError):
        pass
    raise WrongSecret


def _door() -> str:
    return f"{_DOOR}/{_attempt()}"  # torchrun's agent keeps its store over restarts


def _signature(port: int, secret: bytes) -> str:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return hmac.new(secret, json.dumps([run, _attempt(), port]).encode(), "sha256").hexdigest()


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def torch_store(meeting: Meeting, rank: int, size: int, seconds: float) -> dist.Store:
    """What torch's process group needs to begin: addresses of its ranks, under keys that begin with a random word.

    It knows no secrets, so nothing of the product's own goes through it.
    """
    if meeting.store is None:
        return dist.HashStore()
    limit = timedelta(seconds=seconds)
    if ipaddress.ip_address(meeting.store.peer).is_loopback and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ports between the ranks, too
    if meeting.server is not None:
        host = meeting.server.address[0]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        everywhere = family == socket.AF_INET6 and ipaddress.ip_address(host).is_unspecified
        listener = socket.create_server((host, 0), family=family, backlog=1024, dualstack_ipv6=everywhere)
        port, prefix = listener.getsockname()[1], secrets.token_hex(16)
        store = dist.TCPStore(
            meeting.store.peer, port, size, True, limit, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        meeting.store.put("torch", json.dumps([port, prefix]))
    else:
        (told,) = meeting.store.get("torch", seconds=seconds)
        if told is None:
            raise TimeoutError(f"rank {rank}: rank 0 has not opened torch's store within {seconds:.0f} s")
        port, prefix = json.loads(told)
        store = dist.TCPStore(meeting.store.peer, port, size, False, limit, wait_for_workers=False)
    return dist.PrefixStore(prefix, store)

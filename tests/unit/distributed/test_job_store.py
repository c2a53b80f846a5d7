"""The store of a job: what the ranks need of it, and what strangers cannot do to it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from ssgen_ds.distributed.job_store import JobStore, NoStore, StoreLost, StoreServer, WrongSecret
from ssgen_ds.distributed.rendezvous import Place, join
from ssgen_ds.distributed.rendezvous_store import listen, torch_store
from tests.support.launch import free_port

SECRET = b"the job's own"


@pytest.fixture
def server():
    server = StoreServer(socket.create_server(("127.0.0.1", 0)), SECRET)
    yield server
    server.close()


def test_put_get_add_swap(server):
    one, two = (JobStore(server.address, SECRET, 10) for _ in range(2))
    one.put("key", "värde")
    assert two.get("key", "none") == ["värde", None]
    assert [one.add("count", 1), two.add("count", 2), one.add("count", 0)] == [1, 3, 3]
    assert (one.swap("verdict", "", "a"), two.swap("verdict", "", "b")) == ("a", "a")
    assert two.exchange({"x": "1"}, ["x", "key"]) == ["1", "värde"]


def test_who_waits_gets_it_when_it_comes(server):
    one, two = (JobStore(server.address, SECRET, 10) for _ in range(2))
    threading.Timer(0.3, lambda: two.put("late", "1")).start()
    assert one.get("late", seconds=30) == ["1"]


def test_a_store_that_goes_is_lost(server):
    store = JobStore(server.address, SECRET, 10)
    server.close()
    with pytest.raises(StoreLost):
        store.get("key")
    with pytest.raises((StoreLost, NoStore)):
        store.another(1)


JUNK = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100, os.urandom(200), b"\0" * 64, b"\xff" * 4096]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_ignored_and_named(server, caplog, junk):
    store = JobStore(server.address, SECRET, 10)
    store.put("stop", "")
    for _ in range(3):
        with socket.create_connection(server.address) as stranger:
            stranger.sendall(junk)
            stranger.settimeout(20)
            while stranger.recv(4096):
                pass
    assert store.get("stop") == [""]
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(named) == 1 and "from 127.0.0.1; it was ignored" in named[0], "once for an address"


def test_a_forged_word_after_the_greeting_changes_nothing(server):
    """Of somebody in the middle of the connection, or one that repeats what it has seen."""
    victim, witness = (JobStore(server.address, SECRET, 10) for _ in range(2))
    sent = []
    send = victim._socket.sendall

    class Recorder:
        def __getattr__(self, name):
            return getattr(wire, name)

        def sendall(self, data):
            sent.append(data)
            send(data)

    wire, victim._socket = victim._socket, Recorder()
    assert victim.add("count", 1) == 1
    wire.sendall(sent[0])  # once more
    time.sleep(0.3)
    assert witness.get("count") == ["1"]
    with pytest.raises(StoreLost):
        victim.add("count", 1)


def test_another_secret_is_told_on_both_sides(server, caplog):
    with pytest.raises(WrongSecret):
        JobStore(server.address, b"another", 10)
    assert "no proof that it knows the job's secret" in caplog.text


def test_who_takes_the_port_is_not_believed():
    with socket.create_server(("127.0.0.1", 0)) as false:

        def greet() -> None:
            connection = false.accept()[0]
            connection.sendall(b"ssgen-store-1\n" + b"n" * 32)
            connection.recv(64)
            connection.sendall(b"p" * 32)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(WrongSecret):
            JobStore(false.getsockname(), SECRET, 10)


def test_alone_nothing_listens():
    meeting = join(Place(0, 1, 0, 1, 0, "n0"), 5)
    assert meeting.server is None
    torch_store(meeting, 0, 1, 5).set("key", "value")


def test_ranks_of_one_machine_listen_on_its_loopback_only(monkeypatch):
    """Everything that this process listens on once two ranks have met, torch's store included."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    meetings = {}

    def rank(number: int) -> None:
        meetings[number] = join(Place(number, 2, number, 2, 0, "n0"), 20)
        meetings[number, "torch"] = torch_store(meetings[number], number, 2, 20)

    other = threading.Thread(target=rank, args=(1,))
    before = listening()
    other.start()
    rank(0)
    other.join()
    assert [address for address, _ in listening() - before] == ["0100007F", "0100007F"]
    meetings[0, "torch"].set("key", "value")
    assert meetings[1, "torch"].get("key") == b"value"
    for number in (1, 0):
        meetings[number].close()


def listening() -> set[tuple[str, str]]:
    """Addresses and inodes of this process's sockets that listen, as the kernel writes them."""
    own = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if exists(name)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add((fields[1].split(":")[0], fields[9]))
    return found


def exists(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_an_address_that_others_cannot_reach_is_said(caplog, monkeypatch):
    own_name = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: own_name)
    listen("n0", 0, one_node=False).close()
    assert "is no address of this machine that other nodes can reach" in caplog.text
    caplog.clear()
    listen("n0", 0, one_node=True).close()
    listen("127.0.1.1", 0, one_node=False).close()
    assert not caplog.text

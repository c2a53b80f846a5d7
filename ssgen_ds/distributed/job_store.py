"""The store that the ranks of a job share: rank 0 serves it, and only who has the job's secret may read or write it.

torch's own store takes words from anybody who reaches its port, and one of them ended a run. Here each side proves at
the start of a connection that it knows the secret, without telling it, and every message carries a code over its
direction, its number and its text, so that none can be forged, changed, repeated or left out. Texts are not encrypted:
they hold nothing but host names, phases and messages. What speaks otherwise is left aside and named in a warning.
"""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401  socket would import it later, beside the main thread
import hmac
import json
import logging
import os
import socket
import struct
import threading
import time
from typing import Any

log = logging.getLogger(__name__)

_GREETING = b"ssgen-store-1\n"
_NONCE, _CODE = 32, 32  # bytes
_HEAD = struct.Struct(">I")
_LONGEST = 2**20  # bytes of a message
_GREETING_SECONDS = 10.0
_NAMED = 8  # strangers, then no more: a port scan must not fill the log
_LOCK_SECONDS = 5.0


class StoreLost(ConnectionError):
    """The store does not answer: rank 0 has gone, or the network between."""


class WrongSecret(ConnectionError):
    """The two sides do not have the same secret."""


class NoStore(ConnectionError):
    """Something else listens there."""


def _proof(secret: bytes, role: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, role + b"".join(nonces), "sha256")


def _sealed(session: bytes, direction: bytes, number: int, payload: bytes) -> bytes:
    code = hmac.digest(session, direction + struct.pack(">Q", number) + payload, "sha256")
    return _HEAD.pack(len(payload)) + code + payload


def _opened(session: bytes, direction: bytes, number: int, code: bytes, payload: bytes) -> Any:
    if not hmac.compare_digest(code, _sealed(session, direction, number, payload)[_HEAD.size : _HEAD.size + _CODE]):
        raise ValueError("a message without the job's secret")
    return json.loads(payload)


class StoreServer:
    """Serves from a thread of its own until `close`.

    Args:
        listener: a socket that listens; it is closed with the server.
    """

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener, self._secret = listener, secret
        self._values: dict[str, str] = {}
        self._changed = asyncio.Condition()
        self._strangers: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ssgen-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_LOCK_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener, backlog=1024))
        self._loop.run_forever()
        server.close()
        open_ones = asyncio.all_tasks(self._loop)
        for task in open_ones:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*open_ones, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                session = await self._greet(reader, writer)
            number = 0
            while True:
                head = await reader.readexactly(_HEAD.size + _CODE)
                length = _HEAD.unpack(head[: _HEAD.size])[0]
                if length > _LONGEST:
                    raise ValueError("a message too long")
                payload = await reader.readexactly(length)
                request = _opened(session, b">", number, head[_HEAD.size :], payload)
                answer = json.dumps(await self._answer(*request)).encode()
                writer.write(_sealed(session, b"<", number, answer))
                await writer.drain()
                number += 1
        except (ValueError, TypeError, TimeoutError) as error:
            self._name(writer, str(error) or "nothing that it had to say")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self._name(writer, "a word cut short")
        except (OSError, asyncio.CancelledError):
            pass  # it has gone, or the server closes
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        ours = os.urandom(_NONCE)
        writer.write(_GREETING + ours)
        data = await reader.readexactly(_NONCE + _CODE)
        theirs, proof = data[:_NONCE], data[_NONCE:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"rank", ours, theirs)):
            raise ValueError("no proof that it knows the job's secret")
        writer.write(_proof(self._secret, b"store", theirs, ours))
        return _proof(self._secret, b"session", ours, theirs)

    def _name(self, writer: asyncio.StreamWriter, what: str) -> None:
        host = str((writer.get_extra_info("peername") or ["an unknown address"])[0])
        if host not in self._strangers and len(self._strangers) < _NAMED:
            self._strangers.add(host)
            log.warning("warning: the port %s of this job got %s from %s; it was ignored", self.address[1], what, host)

    async def _answer(self, what: str, *rest: Any) -> Any:
        async with self._changed:
            if what == "add":
                key, amount = rest
                self._values[key] = str(int(self._values.get(key, "0")) + amount)
                self._changed.notify_all()
                return int(self._values[key])
            if what == "swap":
                key, expected, value = rest
                if self._values.get(key, "") == expected:
                    self._values[key] = value
                    self._changed.notify_all()
                return self._values.get(key)
            puts, keys, seconds = rest
            self._values.update(puts)
            if puts:
                self._changed.notify_all()
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(lambda: all(key in self._values for key in keys))
            except TimeoutError:
                pass
            return [self._values.get(key) for key in keys]


class JobStore:
    """One rank's connection. Texts under keys; all calls raise StoreLost when the connection broke.

    A call may wait for as long as the other side lives and does not answer, so who must not wait has one of its own.

    Raises StoreLost, WrongSecret or NoStore when there is no connection within `seconds`.
    """

    def __init__(self, address: tuple[str, int], secret: bytes, seconds: float) -> None:
        self._address, self._secret = address, secret
        self.patience: float | None = None  # seconds that an answer may take beyond those that the call waits
        self._number = 0
        self._lock = threading.Lock()
        try:
            self._socket = socket.create_connection(address, timeout=min(seconds, _GREETING_SECONDS))
        except OSError as error:
            raise StoreLost(error.strerror or str(error)) from None
        try:
            self._session = self._greet()
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def peer(self) -> str:
        """Rank 0's address, as this rank has reached it."""
        return self._socket.getpeername()[0]

    def another(self, seconds: float) -> JobStore:
        """A connection of its own to the same store."""
        return JobStore(self._address, self._secret, seconds)

    def close(self) -> None:
        self._socket.close()

    def put(self, key: str, value: str) -> None:
        self.exchange({key: value}, [])

    def get(self, *keys: str, seconds: float = 0.0) -> list[str | None]:
        """The values of the keys; None for a key that no rank has put within `seconds`."""
        return self.exchange({}, list(keys), seconds)

    def exchange(self, puts: dict[str, str], keys: list[str], seconds: float = 0.0) -> list[str | None]:
        """Put and get in one call."""
        return self._ask("exchange", puts, keys, seconds, seconds=seconds)

    def add(self, key: str, amount: int) -> int:
        """The sum under `key` after adding to it; it begins at 0."""
        return self._ask("add", key, amount)

    def swap(self, key: str, expected: str, value: str) -> str | None:
        """Put `value` if `expected` is there ("" for nothing); what is there afterwards."""
        return self._ask("swap", key, expected, value)

    def _greet(self) -> bytes:
        try:
            greeting = self._receive(len(_GREETING) + _NONCE)
        except (StoreLost, TimeoutError):
            raise NoStore("it does not answer as rank 0 of a job does") from None
        if not greeting.startswith(_GREETING):
            raise NoStore("it does not answer as rank 0 of a job does")
        theirs, ours = greeting[len(_GREETING) :], os.urandom(_NONCE)
        try:
            self._socket.sendall(ours + _proof(self._secret, b"rank", theirs, ours))
            proof = self._receive(_CODE)
        except OSError:
            proof = b""
        if not hmac.compare_digest(proof, _proof(self._secret, b"store", ours, theirs)):
            raise WrongSecret
        return _proof(self._secret, b"session", theirs, ours)

    def _ask(self, *request: Any, seconds: float = 0.0) -> Any:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise StoreLost("it does not answer")
        try:
            self._socket.settimeout(None if self.patience is None else seconds + self.patience)
            self._socket.sendall(_sealed(self._session, b">", self._number, json.dumps(request).encode()))
            head = self._receive(_HEAD.size + _CODE)
            payload = self._receive(_HEAD.unpack(head[: _HEAD.size])[0])
            answer = _opened(self._session, b"<", self._number, head[_HEAD.size :], payload)
            self._number += 1
            return answer
        except (OSError, ValueError) as error:
            raise StoreLost(str(error)) from None
        finally:
            self._lock.release()

    def _receive(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(count - len(parts))
            if not part:
                raise StoreLost("closed by peer")
            parts += part
        return bytes(parts)


def connect_within(address: tuple[str, int], secret: bytes, seconds: float, nap: float = 0.5) -> JobStore:
    """Try until the server answers. Raises what the last try raised; a wrong secret is not tried again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return JobStore(address, secret, max(0.1, deadline - time.monotonic()))
        except (StoreLost, NoStore):
            if time.monotonic() + nap >= deadline:
                raise
            time.sleep(nap)

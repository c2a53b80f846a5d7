"""No rank waits for ever: a thread on every rank that tells the others it lives, what it does, and what went wrong.

Every rank writes a beat into the shared store each second. Rank 0 reads them all; the others read rank 0's verdict and
watch rank 0. A verdict ends every rank with exit code 1 and one message, which names the rank and its phase:

    a rank that failed says so before it leaves          at once
    a rank without a beat (killed, stopped, node lost)   after `rank_silence`
    no rank has made progress (ranks that wait for
    different things, a dead network)                    after `collective_timeout`

A stop signal travels the same way, so that one rank's signal reaches all even while they generate independently. And a
rank whose launcher has died (the deepspeed launcher dies of SIGTERM alone) stops as if it had got the signal itself.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ssgen_ds.distributed.job_store import JobStore, StoreLost
from ssgen_ds.distributed.phases import Phases
from ssgen_ds.distributed.signals import StopFlag
from ssgen_ds.errors import EXIT_FAILURE
from ssgen_ds.recipe.schema import RecoveryConfig

BEAT_SECONDS = 1.0
SETUP_PHASES = ("start", "prepare", "load", "export")
SETUP_PATIENCE = 8  # times collective_timeout: tokenizing and converting are one rank's long work, others wait
_LOST_SECONDS = 10.0  # without a store before rank 0 counts as gone; at a normal end it is gone for a moment
_CLOSE_SECONDS = 5.0  # for the threads' last call to the store
_FIRST_WORDS = 1.5  # seconds in which the others read a verdict before rank 0 takes the store away


@dataclass(frozen=True)
class Beat:
    """What is known of one rank."""

    rank: int
    host: str
    place: str  # phase and step
    in_setup: bool
    idle: float  # seconds since its last progress, by its own clock
    silent: float = 0.0  # seconds since its last beat, by the watcher's clock

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def judge(beats: list[Beat], limits: RecoveryConfig, knows_all: bool = True) -> str | None:
    """What is wrong, in a sentence; None while all is well. Only who knows all ranks can miss the progress of all."""
    silent = [beat for beat in beats if beat.silent > limits.rank_silence]
    waiting = next((beat for beat in beats if beat not in silent), None)
    if silent:
        lost = "; ".join(f"{b.name}: no sign of life for {b.silent:.0f} s, last in {b.place}" for b in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        return f"{lost}{more}" + (f" (rank {waiting.rank} waits in {waiting.place})" if waiting else "")
    if not knows_all:
        return None
    patience = SETUP_PATIENCE if any(beat.in_setup for beat in beats) else 1
    idle = min(beat.idle for beat in beats)
    if idle > patience * limits.collective_timeout:
        return f"no rank has made progress for {idle:.0f} s: {_places(beats)}"
    return None


def _places(beats: list[Beat]) -> str:
    ranks: dict[str, list[int]] = {}
    for beat in beats:
        ranks.setdefault(beat.place, []).append(beat.rank)
    return "; ".join(
        f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some[:8]))}{' ...' * (len(some) > 8)} in {place}"
        for place, some in ranks.items()
    )


@dataclass
class Watchdog:
    """Started by `process_group`, one on each rank.

    Args:
        rank, size, local_rank, host: of this process.
        store: a connection of its own: a call that blocks must not block the training thread.
        phases: what this rank does.
        stop: set here when another rank was asked to stop, or when the launcher has died.
        limits: seconds.
        launched: whether a launcher started this process.
        last_words: gets the verdict before the process ends; rank 0 notes it in the run folder.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    store: JobStore | None
    phases: Phases
    stop: StopFlag
    limits: RecoveryConfig
    launched: bool
    last_words: Callable[[str], None] = lambda text: None
    _beats: dict[int, tuple[str, float]] = field(default_factory=dict, init=False)  # last beat, time of its change
    _answered: float = field(default=0.0, init=False)
    _lost: bool = field(default=False, init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _threads: list[threading.Thread] = field(default_factory=list, init=False)

    def start(self) -> None:
        """All ranks call it together: each leaves its first beat before it goes on."""
        self._parent = os.getppid()
        self._answered = time.monotonic()
        if self.store is not None:
            self.store.put(f"beat/{self.rank}", self._beat_text(0))
            self._threads.append(threading.Thread(target=self._talk, name="ssgen-beat", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="ssgen-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """The process may end: a thread that came back from the store while Python shuts down would abort it."""
        self._ended.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_SECONDS)

    def fail(self, text: str) -> None:
        """Tell the others why this rank leaves; returns when they have had the time to read it.

        From then on this rank's own watchdog is quiet: the error that was raised here is the one to show.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._pronounce(text)

    def _pronounce(self, text: str) -> None:
        """The verdict for all, unless another rank was first; rank 0 takes the store away, so it waits a moment."""
        if self.store is None:
            return
        try:
            if self.store.swap("verdict", "", text) == text and self.rank == 0:
                time.sleep(_FIRST_WORDS)
        except StoreLost:
            return

    def blame(self) -> str:
        """After a connection broke: who is gone, as far as can be told within a few seconds; "" when all are there."""
        time.sleep(3 * BEAT_SECONDS)
        quiet = [beat for beat in self._known() if beat.rank != self.rank and beat.silent > 2.5 * BEAT_SECONDS]
        if self._lost and not quiet:  # before its first beat was read
            return "rank 0 is gone, and its store with it"
        return "; ".join(f"{beat.name} is gone, last seen in {beat.place}" for beat in quiet[:8])

    def verdict(self) -> str:
        """What a rank said before it left; "" when none has."""
        try:
            return "" if self.store is None else self.store.get("verdict")[0] or ""
        except StoreLost:
            return ""

    # -- the thread that talks to the store: it may block --------------------------------------------------------------

    def _beat_text(self, number: int) -> str:
        phases = self.phases
        in_setup = phases.names[-1] in SETUP_PHASES
        return json.dumps([number, self.host, phases.place, in_setup, phases.seconds])

    def _talk(self) -> None:
        watched = range(self.size) if self.rank == 0 else (0,)
        keys = [f"beat/{rank}" for rank in watched]
        number = 0
        store = self.store
        assert store is not None  # without one there is no such thread
        try:
            while not self._ended.is_set() and None in store.get(*keys, seconds=BEAT_SECONDS):
                self._answered = time.monotonic()
            while not self._ended.wait(BEAT_SECONDS):
                number += 1
                puts = {f"beat/{self.rank}": self._beat_text(number)}
                if self.stop.is_set:
                    puts["stop"] = str(self.rank)
                stop, verdict, *beats = store.exchange(puts, ["stop", "verdict", *keys])
                now = self._answered = time.monotonic()
                for rank, text in zip(watched, beats, strict=True):
                    if text is not None and self._beats.get(rank, ("", 0.0))[0] != text:
                        self._beats[rank] = (text, now)
                if stop:
                    self.stop.is_set = True
                if verdict:
                    self._end(verdict, speak=self.rank == 0)
        except StoreLost:
            self._lost = True  # `_watch` decides what it means

    def _known(self) -> list[Beat]:
        now = time.monotonic()
        beats = []
        for rank, (text, changed) in sorted(self._beats.items()):
            _, host, place, in_setup, idle = json.loads(text)
            beats.append(Beat(rank, host, place, in_setup, idle + now - changed, now - changed))
        return beats

    # -- the thread that decides: it never blocks ----------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if self.launched and os.getppid() != self._parent:
                self.stop.is_set = True
            if self.store is None:
                continue
            beats = self._known()
            unanswered = time.monotonic() - self._answered
            if unanswered > (_LOST_SECONDS if self._lost else self.limits.rank_silence):
                last = f", last seen in {beats[0].place}" if beats else ""
                text = f"rank 0: its store has not answered for {unanswered:.0f} s{last} ({self._self()})"
                self._end(text, speak=self.rank == 1 or self.local_rank == 0)
            found = judge(beats, self.limits, knows_all=self.rank == 0) if beats else None
            if found is None:
                continue
            if self.rank == 0:
                self._pronounce(found)
            self._end(found, speak=self.rank in (0, 1) or self.local_rank == 0)

    def _self(self) -> str:
        return f"rank {self.rank} waits in {self.phases.place}"

    def _end(self, text: str, speak: bool) -> None:
        """End this process; the training thread may be stuck in a collective that nothing interrupts."""
        if self._ended.is_set():
            return
        self._ended.set()
        if speak:
            print(f"error: {text}", file=sys.stderr, flush=True)
            if "no rank has made progress" in text:
                faulthandler.dump_traceback(sys.stderr)
        self.last_words(text)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILURE)

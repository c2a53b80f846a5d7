"""Reading the examples of later steps while the current ones are trained on."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Protocol

from ssgen_ds.data.plan import Item


class DataPlan(Protocol):
    """What `StepPlan` and `StreamPlan` have in common."""

    def batch(self, step: int) -> list[Item]: ...

    def epoch(self, step: int) -> int: ...


class ReadAhead:
    """A plan behind a thread of its own, which has read so many steps more than were asked for.

    A store is read in microseconds an example; a stream is read, tokenised and perhaps fetched as it comes. What a step
    holds does not change: only this thread touches the plan, and a bad row is an error of the step that it belongs to.

    Args:
        steps: to read ahead; those of the next round, which are asked for together.
        total: steps of the run; nothing is read beyond.
    """

    def __init__(self, plan: DataPlan, steps: int, total: int) -> None:
        self._plan = plan
        self._steps = steps
        self._total = total
        self._read: dict[int, Future[list[Item]]] = {}
        # Epochs of the last steps that were asked for: a stream would have to be read again to know them.
        self._epochs: dict[int, int] = {}
        self._wanted: queue.SimpleQueue[tuple[int, Future[list[Item]]]] = queue.SimpleQueue()
        # A daemon: a stream that hangs must not keep the process from ending.
        threading.Thread(target=self._work, name="ssgen-read", daemon=True).start()

    def batch(self, step: int) -> list[Item]:
        """The examples of one step (from 1). Raises what reading it raised."""
        found = self._want(step)
        for later in range(step + 1, min(step + self._steps, self._total) + 1):
            self._want(later)
        items = found.result()
        del self._read[step]
        self._epochs[step] = items[0].epoch
        self._epochs.pop(step - self._steps - 1, None)  # a whole round is asked for before its first epoch
        return items

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of one of the last steps that were asked for: as many as are read ahead, and one more."""
        return self._epochs[step]

    def _want(self, step: int) -> Future[list[Item]]:
        if step not in self._read:
            self._read[step] = Future()
            self._wanted.put((step, self._read[step]))
        return self._read[step]

    def _work(self) -> None:
        while True:
            step, found = self._wanted.get()
            try:
                found.set_result(self._plan.batch(step))
            except BaseException as error:  # it is raised where the step is asked for
                found.set_exception(error)

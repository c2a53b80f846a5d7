"""Equal rows share an id, and an id keys all that is sampled for an example: from its second time on it gets a number.

    x, y, x, x  ->  x, y, x#2, x#3

Rows of one id have one content, so it does not matter which of them is which: their order is free. An id that is there
once stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

import numpy as np

SEPARATOR = "#"
STREAM_WINDOW = 2**18  # keys that a stream remembers: about 40 MB


def repeat_id(identifier: str, number: int) -> str:
    """The id of the `number`-th row (from 1) of one id."""
    return identifier if number == 1 else f"{identifier}{SEPARATOR}{number}"


def numbered(identifiers: Iterable[str]) -> list[str]:
    """The ids with their numbers. Ids that have theirs stay as they are."""
    given = list(identifiers)
    counter = RepeatCounter(len(given))
    return [repeat_id(identifier, counter(identifier)) for identifier in given]


def repeat_numbers(keys: np.ndarray) -> np.ndarray:
    """How many of keys[:i + 1] are keys[i], for each i: int64, shape (len,)."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] - 1))
    numbers = np.empty(len(keys), np.int64)
    numbers[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys))) + 1
    return numbers


class RepeatCounter:
    """Counts keys as they come, in bounded memory: what was not seen for `window` other keys is new again."""

    def __init__(self, window: int = STREAM_WINDOW) -> None:
        self._window = window
        self._seen: OrderedDict[Hashable, int] = OrderedDict()

    def __call__(self, key: Hashable) -> int:
        """How many times the key was seen, this time included."""
        self._seen[key] = number = self._seen.pop(key, 0) + 1
        if len(self._seen) > self._window:
            self._seen.popitem(last=False)
        return number

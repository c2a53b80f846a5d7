"""Which examples each optimizer step trains on: a pure function of (seed, step), whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ssgen_ds.data.store import Store
from ssgen_ds.data.tokenize import Example
from ssgen_ds.errors import UserError


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams never overlap."""

    EPOCH_ORDER = 0
    FRACTION = 1
    STREAM_BUFFER = 2
    STREAM_SOURCE = 3
    EVALUATION = 4


@dataclass(frozen=True)
class Item:
    """One example in one step. `visit` numbers the times that an example is trained on: samples are keyed by it."""

    index: int
    example: Example
    visit: int
    epoch: int


def bit_generator(seed: int, purpose: Purpose, *numbers: int) -> np.random.Philox:
    """A counter-based source of 64-bit words; numpy promises that raw words never change between its versions."""
    return np.random.Philox(np.random.SeedSequence([seed, int(purpose), *numbers]))


def permutation(seed: int, length: int, purpose: Purpose, *numbers: int) -> np.ndarray:
    """A random order of range(length), int64."""
    return np.argsort(bit_generator(seed, purpose, *numbers).random_raw(length), kind="stable")


class StepPlan:
    """Shuffled epochs over a store, cut into windows of `global_batch`; the last window of an epoch may be smaller.

    A source of weight w is visited w times an epoch: floor(w) whole copies, and for the rest a share of its examples
    that moves on through a fixed random order, so that all are visited equally often over the epochs. Then
    visit = epoch * ceil(largest weight) + copy.
    """

    def __init__(self, store: Store, seed: int, global_batch: int) -> None:
        self.store = store
        self.seed = seed
        self.global_batch = global_batch
        sources = store.numbers("source")
        self._parts = [np.flatnonzero(sources == number) for number in range(len(store.weights))]
        self._visits_per_epoch = max(map(math.ceil, store.weights))
        self._order_of_epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self.examples_per_epoch = sum(
            len(part) * math.floor(weight) + _fraction(weight, len(part))
            for part, weight in zip(self._parts, store.weights, strict=True)
        )
        if not self.examples_per_epoch:
            raise UserError("data.train: no example to train on")
        self.steps_per_epoch = math.ceil(self.examples_per_epoch / global_batch)

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    def batch(self, step: int) -> list[Item]:
        """The examples of one step (from 1), in order; the same on every rank, at any time."""
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, *self._order(epoch))
        _, indices, copies = self._order_of_epoch
        chosen = slice(window * self.global_batch, (window + 1) * self.global_batch)
        return [
            Item(index, self.store[index], epoch * self._visits_per_epoch + copy, epoch)
            for index, copy in zip(indices[chosen].tolist(), copies[chosen].tolist(), strict=True)
        ]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64, copies int32), both (examples_per_epoch,)."""
        indices, copies = [], []
        for number, (part, weight) in enumerate(zip(self._parts, self.store.weights, strict=True)):
            whole, count = math.floor(weight), _fraction(weight, len(part))
            indices += [part] * whole
            copies += [np.full(len(part), copy, np.int32) for copy in range(whole)]
            if count:
                rotation = (epoch * count + np.arange(count)) % len(part)
                indices.append(part[permutation(self.seed, len(part), Purpose.FRACTION, number)[rotation]])
                copies.append(np.full(count, whole, np.int32))
        order = permutation(self.seed, self.examples_per_epoch, Purpose.EPOCH_ORDER, epoch)
        return np.concatenate(indices)[order], np.concatenate(copies)[order]


def _fraction(weight: float, length: int) -> int:
    """How many examples the fractional part of a weight stands for; a source of small weight still gives one."""
    count = round((weight - math.floor(weight)) * length)
    return min(1, length) if count == 0 and weight < 1 else count

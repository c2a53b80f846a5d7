"""Which examples each optimizer step trains on: a pure function of (seed, step), whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np

from ssgen_ds.data.store import Store
from ssgen_ds.data.tokenize import Example
from ssgen_ds.errors import UserError


class Draw(IntEnum):
    """What a stream of random numbers is for; streams never overlap."""

    EPOCH_ORDER = 0
    FRACTION = 1
    STREAM_BUFFER = 2
    STREAM_SOURCE = 3
    EVALUATION = 4


@dataclass(frozen=True)
class Item:
    """One example in one step. `visit` tells apart all times an example is trained on: samples are keyed by it."""

    index: int
    example: Example
    visit: int
    epoch: int


def bit_generator(seed: int, draw: Draw, *numbers: int) -> np.random.Philox:
    """A counter-based source of 64-bit words; numpy promises that raw words never change between its versions."""
    return np.random.Philox(np.random.SeedSequence([seed, int(draw), *numbers]))


def permutation(seed: int, length: int, draw: Draw, *numbers: int) -> np.ndarray:
    """A random order of range(length), int64."""
    return np.argsort(bit_generator(seed, draw, *numbers).random_raw(length), kind="stable")


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
        """The epoch (from 0) that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[Item]:
        """The examples of one step (from 0), in order; the same on every rank, at any time."""
        epoch, window = divmod(step, self.steps_per_epoch)
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
                indices.append(part[permutation(self.seed, len(part), Draw.FRACTION, number)[rotation]])
                copies.append(np.full(count, whole, np.int32))
        order = permutation(self.seed, self.examples_per_epoch, Draw.EPOCH_ORDER, epoch)
        return np.concatenate(indices)[order], np.concatenate(copies)[order]


def _fraction(weight: float, length: int) -> int:
    """How many examples the fractional part of a weight stands for; a source of small weight still gives one."""
    count = round((weight - math.floor(weight)) * length)
    return min(1, length) if count == 0 and weight < 1 else count


def shard_by_length(
    lengths: Sequence[int], world_size: int, micro_batch: int, max_tokens: int | None = None, padded: bool = True
) -> list[list[list[int]]]:
    """Deal sequences out as [rank][micro batch][index], alike in length within a micro batch and within a round.

    Micro batches hold at most `micro_batch` sequences and, with `max_tokens`, so many tokens, padding included where
    they are `padded`; a longer sequence goes alone. All ranks get the same number of them, or, where there are too few
    sequences, some get one fewer; each round's longest goes to the rank with the fewest tokens so far.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ordered = [lengths[index] for index in by_length]
    rounds = math.ceil(math.ceil(len(lengths) / micro_batch) / world_size)
    pieces = min(len(lengths), rounds * world_size)
    bounds = [len(lengths) * piece // max(pieces, 1) for piece in range(pieces + 1)]
    micros_tokens = [(_tokens(ordered[a:b], padded), ordered[a]) for a, b in pairwise(bounds)]
    if max_tokens is not None and any(tokens > max(max_tokens, longest) for tokens, longest in micros_tokens):
        bounds = _even_bounds(ordered, world_size, micro_batch, max_tokens, padded)
    micros = [by_length[start:end] for start, end in pairwise(bounds)]
    shards: list[list[list[int]]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for start in range(0, len(micros), world_size):
        ranks = sorted(range(world_size), key=tokens.__getitem__)
        heaviest_first = sorted(micros[start : start + world_size], key=lambda micro: -sum(lengths[i] for i in micro))
        for rank, micro in zip(ranks, heaviest_first, strict=False):
            shards[rank].append(micro)
            tokens[rank] += sum(lengths[i] for i in micro)
    return shards


def _tokens(lengths: Sequence[int], padded: bool) -> int:
    """Of one micro batch, longest first."""
    return len(lengths) * lengths[0] if padded else sum(lengths)


def _even_bounds(ordered: list[int], world_size: int, micro_batch: int, max_tokens: int, padded: bool) -> list[int]:
    """Where to cut, with the fewest micro batches a rank and, of these cuts, the smallest largest micro batch."""
    most = len(_cut(ordered, micro_batch, max_tokens, padded)) - 1
    pieces = math.ceil(most / world_size) * world_size
    low, high = 1, max_tokens  # the smallest budget that needs no more than these pieces, by bisection
    while low < high:
        middle = (low + high) // 2
        if len(_cut(ordered, micro_batch, middle, padded)) - 1 <= pieces:
            high = middle
        else:
            low = middle + 1
    return _cut(ordered, micro_batch, low, padded)


def _cut(ordered: list[int], micro_batch: int, max_tokens: int, padded: bool) -> list[int]:
    """Bounds of micro batches that are filled one after another."""
    bounds = [0]
    for end in range(1, len(ordered) + 1):
        begin = bounds[-1]
        full = end - begin > micro_batch or _tokens(ordered[begin:end], padded) > max_tokens
        if full and end - 1 > begin:
            bounds.append(end - 1)
    return [*bounds, len(ordered)]

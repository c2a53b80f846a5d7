"""From training sequences to one optimizer step's micro batches: the accumulation window.

Every rank builds the whole window from the same examples and takes its share. So the global normaliser and the number
of micro steps are known on all ranks without asking anybody, whatever the label counts are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

IGNORE = -100


@dataclass(frozen=True)
class Sequence:
    """What the model reads, what it must predict (IGNORE: nothing), and how much each of its labels weighs."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Layout:
    """Where the N tokens of a packed row lie in a padded batch [B, L]: at `row * L + position`."""

    rows: int
    width: int
    slots_N: torch.Tensor
    positions_1N: torch.Tensor

    def to_padded(self, packed_1HND: torch.Tensor) -> torch.Tensor:
        """[1, heads, N, D] -> [B, heads, L, D], zeros where there is no token."""
        _, heads, _, size = packed_1HND.shape
        flat_SHD = _Scatter.apply(packed_1HND[0].transpose(0, 1), self.slots_N, self.rows * self.width)
        return flat_SHD.view(self.rows, self.width, heads, size).transpose(1, 2)

    def to_packed(self, padded_BLHD: torch.Tensor) -> torch.Tensor:
        """[B, L, heads, D] -> [1, N, heads, D]."""
        return padded_BLHD.flatten(0, 1).index_select(0, self.slots_N)[None]


class _Scatter(torch.autograd.Function):
    """Rows [N, ...] to their slots of [S, ...]. torch's own index_copy would keep the rows for the backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slots_N: torch.Tensor, size: int) -> torch.Tensor:
        ctx.slots_N = slots_N
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, slots_N, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, ctx.slots_N), None, None


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass: right-padded rows [B, L], or packed into one row [1, N] with a layout.

    The labels are those of all rows one after another. `predicting_N` says where in the flattened input each is
    predicted: one position before its own.
    """

    input_ids_BL: torch.Tensor
    predicting_N: torch.Tensor
    labels_N: torch.Tensor
    weights_N: torch.Tensor
    lengths: list[int]
    layout: Layout | None = None


@dataclass(frozen=True)
class Window:
    """This rank's micro batches of one optimizer step, and the totals over all ranks."""

    micro_batches: list[MicroBatch]
    global_weight: float  # sum of label weights: the loss is divided by it once
    num_tokens: int  # tokens read by the model, padding apart
    num_labels: int


@dataclass(frozen=True)
class Packing:
    """How sequences share a forward pass: at most so many, at most so many tokens, with or without padding."""

    sequences: int
    tokens: int | None = None
    is_packed: bool = False


def build_window(
    sequences: list[Sequence], packing: Packing, rank: int, world_size: int, device: torch.device | str
) -> Window:
    """Cut the sequences of one optimizer step into micro batches of similar length and take this rank's.

    All ranks get the same number of micro batches: a rank without work for its last one repeats a sequence at weight 0,
    because the collectives inside a sharded model's forward and backward must be matched.
    """
    lengths = [len(sequence.input_ids) for sequence in sequences]
    shards = shard_by_length(lengths, world_size, packing.sequences, packing.tokens, padded=not packing.is_packed)
    mine = [[sequences[i] for i in micro] for micro in shards[rank]]
    rounds = max(len(shard) for shard in shards)
    shortest = min(sequences, key=lambda sequence: len(sequence.input_ids))
    idle = Sequence(shortest.input_ids, shortest.labels, weight=0.0)
    mine += [[idle]] * (rounds - len(mine))
    return Window(
        micro_batches=[collate(micro, device, packing.is_packed) for micro in mine],
        global_weight=sum(sequence.weight * sequence.num_labels for sequence in sequences),
        num_tokens=sum(lengths),
        num_labels=sum(sequence.num_labels for sequence in sequences),
    )


def collate(sequences: list[Sequence], device: torch.device | str, is_packed: bool = False) -> MicroBatch:
    """Pad on the right: rows then get the same numbers as alone, bitwise. Or pack them into one row.

    Indices are worked out here, on the host: looking for labels on a GPU would make the host wait for it.
    """
    lengths = [len(sequence.input_ids) for sequence in sequences]
    width = max(lengths)
    starts = [0, *accumulate(lengths)][:-1] if is_packed else [row * width for row in range(len(lengths))]
    input_ids = torch.zeros(sum(lengths) if is_packed else len(lengths) * width, dtype=torch.long)
    predicting, labels, weights = [], [], []
    for start, sequence in zip(starts, sequences, strict=True):
        input_ids[start : start + len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        labelled = [place for place, label in enumerate(sequence.labels) if label != IGNORE]
        predicting += [start + place - 1 for place in labelled]
        labels += [sequence.labels[place] for place in labelled]
        weights += [sequence.weight] * len(labelled)
    return MicroBatch(
        input_ids_BL=_to(input_ids.view(1 if is_packed else len(lengths), -1), device),
        predicting_N=_to(torch.tensor(predicting, dtype=torch.long), device),
        labels_N=_to(torch.tensor(labels, dtype=torch.long), device),
        weights_N=_to(torch.tensor(weights, dtype=torch.float32), device),
        lengths=lengths,
        layout=_layout(lengths, width, device) if is_packed else None,
    )


def _layout(lengths: list[int], width: int, device: torch.device | str) -> Layout:
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.repeat_interleave(torch.tensor(lengths))
    return Layout(len(lengths), width, _to(rows * width + positions, device), _to(positions[None], device))


def _to(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on the device. A GPU copies it from pinned memory, so that the host need not wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def shard_by_length(
    lengths: list[int], world_size: int, micro_batch: int, max_tokens: int | None = None, padded: bool = True
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


def _tokens(lengths: list[int], padded: bool) -> int:
    """Tokens of one micro batch whose longest sequence comes first."""
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

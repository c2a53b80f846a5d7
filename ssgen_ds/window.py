"""From training sequences to one optimizer step's micro batches: the accumulation window.

Every rank builds the whole window from the same examples and takes its share. So the global normaliser and the number
of micro steps are known on all ranks without asking anybody, whatever the label counts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from ssgen_ds.data.loader import shard_by_length
from ssgen_ds.modeling.packed import Layout

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
    """To a GPU from pinned memory, so that the host need not wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

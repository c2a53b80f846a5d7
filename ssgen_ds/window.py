"""From training sequences to one optimizer step's micro batches: the accumulation window.

Every rank builds the whole window from the same examples and takes its share. So the global normaliser and the number
of micro steps are known on all ranks without asking anybody, whatever the label counts are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssgen_ds.data.loader import shard_by_length

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
    """Right-padded tensors of one forward pass; `weights_N` has an entry for each label, row by row."""

    input_ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    lengths_B: torch.Tensor
    weights_N: torch.Tensor


@dataclass(frozen=True)
class Window:
    """This rank's micro batches of one optimizer step, and the totals over all ranks."""

    micro_batches: list[MicroBatch]
    global_weight: float  # sum of label weights: the loss is divided by it once
    num_tokens: int  # tokens read by the model, padding apart
    num_labels: int


def build_window(
    sequences: list[Sequence], micro_batch: int, rank: int, world_size: int, device: torch.device | str
) -> Window:
    """Cut the sequences of one optimizer step into micro batches of similar length and take this rank's.

    All ranks get the same number of micro batches: a rank without work for its last one repeats a sequence at weight 0,
    because the collectives inside a sharded model's forward and backward must be matched.
    """
    shards = shard_by_length([len(sequence.input_ids) for sequence in sequences], world_size, micro_batch)
    mine = [[sequences[i] for i in micro] for micro in shards[rank]]
    rounds = max(len(shard) for shard in shards)
    shortest = min(sequences, key=lambda sequence: len(sequence.input_ids))
    idle = Sequence(shortest.input_ids, shortest.labels, weight=0.0)
    mine += [[idle]] * (rounds - len(mine))
    return Window(
        micro_batches=[collate(micro, device) for micro in mine],
        global_weight=sum(sequence.weight * sequence.num_labels for sequence in sequences),
        num_tokens=sum(len(sequence.input_ids) for sequence in sequences),
        num_labels=sum(sequence.num_labels for sequence in sequences),
    )


def collate(sequences: list[Sequence], device: torch.device | str) -> MicroBatch:
    """Pad on the right: rows then get the same numbers as alone, bitwise."""
    width = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full((len(sequences), width), IGNORE, dtype=torch.long)
    weights = []
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
        weights += [sequence.weight] * sequence.num_labels
    lengths = torch.tensor([len(sequence.input_ids) for sequence in sequences])
    return MicroBatch(input_ids.to(device), labels.to(device), lengths.to(device), torch.tensor(weights, device=device))

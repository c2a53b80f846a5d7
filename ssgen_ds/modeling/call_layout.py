"""A call of the model on the device: where its tokens go, and the attention of each of its groups.

All indices are made on the host, from what is known there, and moved in one transfer: the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

from ssgen_ds.modeling.pieces import Group, Piece, groups_of

_ALIGNED = 8  # keys come in multiples of it: the kernels that take a mask would copy another one in every layer


def aligned(length: int) -> int:
    """Slots for so many tokens."""
    return -(-length // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class GroupPlaces:
    """A group of attention in numbers, on the host.

    Attributes:
        batch: rows of queries.
        keys: how many slots they read.
        count: tokens.
        lists: places of the tokens in [batch * width], rows of the memory, positions [batch * width]; empty where not
            needed.
    """

    group: Group
    batch: int
    keys: int
    count: int
    lists: tuple[list[int], list[int], list[int]]

    @classmethod
    def of(cls, group: Group, pieces: list[Piece], rows: int) -> GroupPlaces:
        mine, width = [pieces[place] for place in group.pieces], group.width
        batch = rows if group.rows is None else len(group.rows)
        count, end = sum(len(piece.tokens) for piece in mine), max(piece.end for piece in mine)
        keys = width if group.kind == "prompts" else end if group.kind == "chunk" else aligned(end)
        lanes = [piece.row for piece in mine] if group.rows is None else range(batch)
        inside: list[int] = []
        positions: list[int] = []
        if count < batch * width:
            inside = [
                lane * width + i for lane, piece in zip(lanes, mine, strict=True) for i in range(len(piece.tokens))
            ]
        if group.kind == "rows":
            positions = [0] * (batch * width)  # padding sees slot 0, so that no row is empty
            for lane, piece in zip(lanes, mine, strict=True):
                positions[lane * width : lane * width + len(piece.tokens)] = range(piece.begin, piece.end)
        return cls(group, batch, keys, count, (inside, list(group.rows or ()), positions))


@dataclass(frozen=True)
class Masks:
    """How masks are made for a model: its window, its attention function, and its dtype."""

    window: int | None
    is_sdpa: bool
    dtype: torch.dtype

    def causal(self, positions_BQ: torch.Tensor, keys: int, kind: str) -> torch.Tensor:
        """[B, 1, Q, K], to be added to scores: causal by absolute position, in the window of the layer's kind."""
        keys_K = torch.arange(keys, device=positions_BQ.device)
        query_BQ1 = positions_BQ[:, :, None]
        hidden_BQK = keys_K > query_BQ1
        if kind == "sliding_attention" and self.window is not None:
            hidden_BQK |= keys_K <= query_BQ1 - self.window
        # The eager functions of some families turn a row of -inf into NaN.
        never = -torch.inf if self.is_sdpa else torch.finfo(self.dtype).min
        mask_BQK = torch.zeros(hidden_BQK.shape, dtype=self.dtype, device=hidden_BQK.device)
        return mask_BQK.masked_fill_(hidden_BQK, never)[:, None]

    def is_narrower(self, kind: str, length: int) -> bool:
        """Whether layers of this kind do not see so many tokens."""
        return kind == "sliding_attention" and self.window is not None and self.window < length


@dataclass
class GroupLayout:
    """The same on the device, with masks made when a layer first asks for them."""

    places: GroupPlaces
    begin: int  # of its tokens in the call
    masks: Masks
    inside_n: torch.Tensor
    rows_B: torch.Tensor
    positions_BQ: torch.Tensor
    _made: dict[tuple[str, int], torch.Tensor | CausalBias | None] = field(default_factory=dict)

    def queries(self, packed_1HND: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, D]; a view where nothing is padded."""
        mine_HnD = packed_1HND[0, :, self.begin : self.begin + self.places.count]
        batch, width = self.places.batch, self.places.group.width
        if not len(self.inside_n):
            return mine_HnD.unflatten(1, (batch, width)).transpose(0, 1)
        padded = mine_HnD.new_zeros(batch * width, mine_HnD.shape[0], mine_HnD.shape[2])
        padded[self.inside_n] = mine_HnD.transpose(0, 1)
        return padded.view(batch, width, *padded.shape[1:]).transpose(1, 2)

    def packed(self, output_BQHD: torch.Tensor) -> torch.Tensor:
        """[n, H, D] in the order of the call."""
        output_PHD = output_BQHD.flatten(0, 1)
        return output_PHD[self.inside_n] if len(self.inside_n) else output_PHD

    def memory(self, kept_BHKD: torch.Tensor) -> torch.Tensor:
        """What its rows remember, as far as they read; a view of all rows or of one."""
        kept, rows = kept_BHKD[:, :, : self.places.keys], self.places.group.rows
        if rows is None:
            return kept
        return kept[rows[0] : rows[0] + 1] if len(rows) == 1 else kept[self.rows_B]

    def mask(self, kind: str, repeats: int) -> torch.Tensor | CausalBias | None:
        """What the attention function gets in a layer of this kind with so many queries a key; None: it is causal."""
        key = (kind, repeats if self.masks.is_sdpa else 1)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, kind: str, repeats: int) -> torch.Tensor | CausalBias | None:
        group, keys = self.places.group, self.places.keys
        can_be_causal = self.masks.is_sdpa and not self.masks.is_narrower(kind, keys)
        if group.kind == "prompts" and can_be_causal:
            return None
        if group.kind == "chunk" and can_be_causal and self.rows_B.device.type == "cuda":
            return causal_lower_right(group.width, keys)  # elsewhere no kernel has it
        if group.kind == "rows":
            positions_BQ = self.positions_BQ.view(self.places.batch, group.width)
        else:
            positions_BQ = torch.arange(keys - group.width, keys, device=self.rows_B.device)[None]
        mask_B1QK = self.masks.causal(positions_BQ, keys, kind)
        if repeats == 1 or group.width == 1 or group.kind == "chunk":
            return mask_B1QK
        return mask_B1QK.expand(-1, repeats, -1, -1).reshape(len(mask_B1QK), 1, -1, keys)


@dataclass(frozen=True)
class CallLayout:
    """A call on the device: its N tokens in the order of its groups.

    Attributes:
        slots_N: absolute positions, which are slots of the memory, too.
        rows_N: of the batch.
        wanted_W: indices of the tokens at which logits are wanted, piece by piece.
        keys: slots that the call reads.
    """

    tokens_N: torch.Tensor
    slots_N: torch.Tensor
    rows_N: torch.Tensor
    wanted_W: torch.Tensor
    keys: int
    groups: list[GroupLayout]
    pieces: list[Piece]  # in the order of their tokens

    @classmethod
    def of(cls, pieces: list[Piece], rows: int, masks: Masks, device: torch.device) -> CallLayout:
        """Of pieces of different rows in a batch of so many."""
        groups = groups_of(pieces, rows, can_be_causal=masks.is_sdpa)
        order = [place for group in groups for place in group.pieces]
        begins, begin = [0] * len(pieces), 0
        for place in order:
            begins[place], begin = begin, begin + len(pieces[place].tokens)
        ordered = [pieces[place] for place in order]
        counted = [GroupPlaces.of(group, pieces, rows) for group in groups]
        tokens_N, slots_N, rows_N, wanted_W, *rest = on_device(
            [
                [token for piece in ordered for token in piece.tokens],
                [slot for piece in ordered for slot in range(piece.begin, piece.end)],
                [piece.row for piece in ordered for _ in piece.tokens],
                [begins[place] + i for place, piece in enumerate(pieces) for i in piece.wanted],
                *chain.from_iterable(one.lists for one in counted),
            ],
            device,
        )
        found, begin = [], 0
        for one, of_it in zip(counted, zip(rest[::3], rest[1::3], rest[2::3], strict=True), strict=True):
            found.append(GroupLayout(one, begin, masks, *of_it))
            begin += one.count
        return cls(tokens_N, slots_N, rows_N, wanted_W, aligned(max(piece.end for piece in pieces)), found, ordered)


def masked_attention(
    query_BHQD: torch.Tensor,
    key_BKD: torch.Tensor,
    value_BKD: torch.Tensor,
    mask: torch.Tensor | CausalBias,
    scale: float | None,
) -> torch.Tensor:
    """Attention with a mask [B, Q, H, D]; keys and values are not repeated for the queries that share them.

    Queries that share a key are rows of one head. Kernels with a mask know no other way: transformers would copy all
    keys and values to all heads in every layer.
    """
    batch, heads, width, size = query_BHQD.shape
    kv_heads = key_BKD.shape[1]
    if isinstance(mask, CausalBias) or (heads != kv_heads and width > 1 and mask.shape[2] == width):  # a chunk
        mask = mask if isinstance(mask, CausalBias) else mask.to(query_BHQD.dtype)
        output = F.scaled_dot_product_attention(
            query_BHQD, key_BKD, value_BKD, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
        )
        return output.transpose(1, 2)
    query_BKQD = query_BHQD.reshape(batch, kv_heads, -1, size)
    output = F.scaled_dot_product_attention(
        query_BKQD, key_BKD, value_BKD, attn_mask=mask.to(query_BKQD.dtype), scale=scale
    )
    return output.reshape(batch, heads, width, -1).transpose(1, 2)


def on_device(lists: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Lists of integers as tensors, in one transfer for which the host does not wait."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.long)
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(one) for one in lists]))

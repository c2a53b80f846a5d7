"""What a call of the model feeds, planned on the host: where each token goes, and who attends to whom.

The tokens of a batch are fed as one row of N, so that nothing but attention sees padding. Attention runs in groups of
rows that cost about the same, since a batch mixes what is far apart: most rows feed a few tokens after hundreds that
are remembered, and one that has just come in feeds a whole prompt.

    prompts   fed from position 0: they see nothing but themselves, so that a causal kernel needs no mask
    a chunk   of a long prompt, after what is remembered of it: causal again, seen from its end, in a call of its own
    rows      a few tokens each after what is remembered: with a mask, on all rows of the memory
    wide rows the same with many tokens each: with a mask, on copies of their rows of the memory
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

CHUNK = 256  # tokens from which a row alone keeps a kernel busy
# Copying a row of keys and values costs about as much as so many queries over it: 30 to 40 by the published rates of an
# H100 and a 4090, less on a CPU.
_COPY = 32
_EVEN = 2  # within a group of prompts the longest is at most so many times the shortest

Kind = Literal["prompts", "chunk", "rows"]


@dataclass(frozen=True)
class Piece:
    """Tokens of one row of the batch, at the absolute positions from `begin` on.

    Attributes:
        wanted: indices into `tokens` at which logits are wanted, ascending.
        sequence: the number of what is sampled in the row, for who records it.
    """

    row: int
    begin: int
    tokens: Sequence[int]
    wanted: Sequence[int]
    sequence: int = 0

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


@dataclass(frozen=True)
class Group:
    """Pieces whose attention is one call of a kernel.

    Attributes:
        pieces: their places in the call.
        rows: of the memory, one for each row of queries; None for all rows in order.
        width: queries of a row, the longest piece.
    """

    kind: Kind
    pieces: tuple[int, ...]
    rows: tuple[int, ...] | None
    width: int


def cut(pieces: list[Piece], tokens: int, wanted: int) -> Iterator[list[Piece]]:
    """Calls of at most so many tokens and wanted logits; what is too long for one goes on in the next, in order."""
    call: list[Piece] = []
    room, places = tokens, wanted
    for piece in pieces:
        rest: Piece | None = piece
        while rest is not None:
            if room == 0 or (places == 0 and rest.wanted):
                yield call
                call, room, places = [], tokens, wanted
            first, rest = _split(rest, room, places)
            call.append(first)
            room -= len(first.tokens)
            places -= len(first.wanted)
    if call:
        yield call


def _split(piece: Piece, tokens: int, wanted: int) -> tuple[Piece, Piece | None]:
    """The longest beginning within both limits, and the rest."""
    end = min(len(piece.tokens), tokens)
    if sum(place < end for place in piece.wanted) > wanted:
        end = piece.wanted[wanted]  # the first that is one too many
    if end == len(piece.tokens):
        return piece, None
    inside = [place for place in piece.wanted if place < end]
    later = [place - end for place in piece.wanted[len(inside) :]]
    first = replace(piece, tokens=piece.tokens[:end], wanted=inside)
    return first, replace(piece, begin=piece.begin + end, tokens=piece.tokens[end:], wanted=later)


def groups_of(pieces: list[Piece], rows: int, can_be_causal: bool) -> list[Group]:
    """The attention calls of one call of the model.

    Args:
        pieces: at most one of each row.
        rows: of the batch.
        can_be_causal: the attention function has a kernel for long chunks that needs no mask.
    """
    prompts, chunks, rest = [], [], []
    for place, piece in enumerate(pieces):
        if piece.begin == 0:
            prompts.append(place)
        elif can_be_causal and len(piece.tokens) >= CHUNK:
            chunks.append(place)
        else:
            rest.append(place)
    groups = [Group("chunk", (place,), (pieces[place].row,), len(pieces[place].tokens)) for place in chunks]
    return [*_prompts(pieces, prompts), *groups, *_rows(pieces, rest, rows)]


def _prompts(pieces: list[Piece], places: list[int]) -> Iterator[Group]:
    """Padding is cheap while lengths are of one size: a new group begins where a piece is less than half as long."""
    places = sorted(places, key=lambda place: -len(pieces[place].tokens))
    while places:
        width = len(pieces[places[0]].tokens)
        count = sum(_EVEN * len(pieces[place].tokens) >= width for place in places)
        group, places = places[:count], places[count:]
        yield Group("prompts", tuple(group), tuple(pieces[place].row for place in group), width)


def _rows(pieces: list[Piece], places: list[int], rows: int) -> Iterator[Group]:
    """One group over all rows, and one over copies of the rows that are too wide for it: the cheapest such pair."""
    if not places:
        return
    order = sorted(places, key=lambda place: len(pieces[place].tokens))
    widths = [len(pieces[place].tokens) for place in order]
    costs = {
        narrow: (rows * widths[narrow - 1] if narrow else 0) + (len(order) - narrow) * (widths[-1] + _COPY)
        for narrow in range(len(order) + 1)
        if narrow in (0, len(order)) or widths[narrow - 1] < widths[narrow]
    }
    narrow = min(costs, key=lambda count: (costs[count], -count))
    if narrow:
        # In the order of the rows: of calls that feed one token in every row, queries and outputs are mere views.
        group = sorted(order[:narrow], key=lambda place: pieces[place].row)
        yield Group("rows", tuple(group), None, widths[narrow - 1])
    if narrow < len(order):
        group = order[narrow:]
        yield Group("rows", tuple(group), tuple(pieces[place].row for place in group), widths[-1])

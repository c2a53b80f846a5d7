"""Calls within their limits, and the attention groups of a call, against what can be counted by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.modeling.pieces import CHUNK, Group, Piece, cut, groups_of


def piece(row: int, begin: int, count: int, wanted: tuple[int, ...] | None = None) -> Piece:
    return Piece(row, begin, range(count), (count - 1,) if wanted is None else wanted)


@st.composite
def some_pieces(draw) -> list[Piece]:
    found = []
    for row in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 30))
        wanted = sorted(draw(st.sets(st.integers(0, count - 1))))
        begin = draw(st.sampled_from([0, 5, 400]))
        found.append(Piece(row, begin, [100 * row + i for i in range(count)], wanted))
    return found


@given(some_pieces(), st.integers(1, 40), st.integers(1, 8))
def test_calls_hold_every_token_once_within_their_limits(pieces, tokens, logits):
    calls = list(cut(pieces, tokens, logits))
    fed = {piece.row: list[tuple[int, int]]() for piece in pieces}
    for call in calls:
        assert call and sum(len(part.tokens) for part in call) <= tokens
        assert sum(len(part.wanted) for part in call) <= logits
        assert len({part.row for part in call}) == len(call), "a row comes once in a call"
        for part in call:
            fed[part.row] += zip(range(part.begin, part.end), part.tokens, strict=True)
    for one in pieces:
        assert fed[one.row] == list(zip(range(one.begin, one.end), one.tokens, strict=True)), "in order"
    asked = [(one.row, one.begin + place) for one in pieces for place in one.wanted]
    assert [(one.row, one.begin + place) for call in calls for one in call for place in one.wanted] == asked


def test_a_call_is_filled_before_the_next_one_begins():
    first, second = piece(0, 7, 5, (1, 4)), piece(1, 0, 4, (3,))
    calls = list(cut([first, second], 6, 9))
    assert [[(part.row, part.begin, part.end, list(part.wanted)) for part in call] for call in calls] == [
        [(0, 7, 12, [1, 4]), (1, 0, 1, [])],
        [(1, 1, 4, [2])],
    ]


@given(some_pieces(), st.booleans())
def test_every_piece_is_in_one_group(pieces, can_be_causal):
    groups = groups_of(pieces, rows=8, can_be_causal=can_be_causal)
    assert sorted(place for group in groups for place in group.pieces) == list(range(len(pieces)))
    for group in groups:
        mine = [pieces[place] for place in group.pieces]
        assert group.width == max(len(one.tokens) for one in mine)
        assert all((one.begin == 0) == (group.kind == "prompts") for one in mine)
        assert group.rows is None or list(group.rows) == [one.row for one in mine]


def test_a_prompt_does_not_widen_the_rows_beside_it():
    """63 rows feed a token each, and one that came in reads its prompt; padded together, 86 times the arithmetic."""
    pieces = [piece(row, 500, 1) for row in range(63)] + [piece(63, 0, 1024)]
    groups = groups_of(pieces, rows=64, can_be_causal=True)
    assert groups == [Group("prompts", (63,), (63,), 1024), Group("rows", tuple(range(63)), None, 1)]


def test_prompts_of_one_size_share_a_kernel():
    pieces = [piece(row, 0, count) for row, count in enumerate((30, 100, 50, 49, 24))]
    groups = groups_of(pieces, rows=5, can_be_causal=True)
    assert [(group.pieces, group.width) for group in groups] == [((1, 2), 100), ((3, 0), 49), ((4,), 24)]


def test_wide_rows_are_copied_when_that_is_cheaper():
    """Of 8 rows one feeds 100 tokens: 8 * 3 + (100 + 32) queries, not 8 * 100. With 20 tokens 8 * 20 is less than that
    and a copy."""
    narrow = [piece(row, 50, 3) for row in range(7)]
    wide = groups_of([*narrow, piece(7, 50, 100)], rows=8, can_be_causal=True)
    assert [(group.pieces, group.rows, group.width) for group in wide] == [((*range(7),), None, 3), ((7,), (7,), 100)]
    near = groups_of([*narrow, piece(7, 50, 8)], rows=8, can_be_causal=True)
    assert [(group.pieces, group.rows, group.width) for group in near] == [((*range(8),), None, 8)]


def test_a_long_chunk_after_a_memory_needs_no_mask():
    pieces = [piece(0, 4096, CHUNK), piece(1, 4096, CHUNK - 1)]
    with_kernel = groups_of(pieces, rows=2, can_be_causal=True)
    assert [group.kind for group in with_kernel] == ["chunk", "rows"]
    without = groups_of(pieces, rows=2, can_be_causal=False)
    assert [group.kind for group in without] == ["rows"]

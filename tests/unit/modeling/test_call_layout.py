"""The layout of a call against indices and masks by hand, and its attention against plain attention token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from ssgen_ds.modeling.call_layout import CallLayout, GroupLayout, Masks, aligned, masked_attention, on_device
from ssgen_ds.modeling.pieces import Piece

CPU = torch.device("cpu")
SDPA = Masks(None, True, torch.float32)
HIDDEN = -torch.inf
# Two prompts, and two rows that go on after what is remembered of them, in a batch of four.
PIECES = [
    Piece(2, 5, [50, 51], [1]),
    Piece(0, 0, [10, 11, 12], [2]),
    Piece(1, 0, [20, 21], [0, 1]),
    Piece(3, 7, [70], [0]),
]


def groups(pieces: list[Piece] = PIECES, masks: Masks = SDPA, rows: int = 4) -> list[GroupLayout]:
    return CallLayout.of(pieces, rows, masks, CPU).groups


def seen(mask: torch.Tensor) -> list[list[int]]:
    """The keys that each query of a mask [1, 1, Q, K] sees."""
    return [row.nonzero().flatten().tolist() for row in (mask[0, 0] == 0)]


def test_tokens_go_in_the_order_of_the_groups() -> None:
    """Prompts come first; logits are wanted in the order of the pieces."""
    layout = CallLayout.of(PIECES, 4, SDPA, CPU)
    assert layout.tokens_N.tolist() == [10, 11, 12, 20, 21, 50, 51, 70]
    assert layout.slots_N.tolist() == [0, 1, 2, 0, 1, 5, 6, 7]
    assert layout.rows_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert layout.wanted_W.tolist() == [6, 2, 3, 4, 7]
    assert layout.keys == 8
    prompts, rows = layout.groups
    assert (prompts.begin, prompts.places.batch, prompts.places.keys, prompts.places.count) == (0, 2, 3, 5)
    assert prompts.places.lists == ([0, 1, 2, 3, 4], [0, 1], [])
    assert (rows.begin, rows.places.batch, rows.places.keys, rows.places.count) == (5, 4, 8, 3)
    assert rows.places.lists == ([4, 5, 6], [], [0, 0, 0, 0, 5, 6, 7, 0])


def test_queries_are_padded_and_outputs_packed_again() -> None:
    packed_1HND = torch.arange(1.0, 9.0).view(1, 1, 8, 1)
    prompts, rows = groups()
    assert prompts.queries(packed_1HND)[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert rows.queries(packed_1HND)[:, 0, :, 0].tolist() == [[0, 0], [0, 0], [6, 7], [8, 0]]
    for group, expected in ((prompts, [1, 2, 3, 4, 5]), (rows, [6, 7, 8])):
        assert group.packed(group.queries(packed_1HND).transpose(1, 2))[:, 0, 0].tolist() == expected


def test_nothing_is_copied_where_every_row_feeds_a_token() -> None:
    (group,) = groups([Piece(row, 9, [row], [0]) for row in range(4)])
    packed_1HND, kept_BHKD = torch.arange(8.0).view(1, 2, 4, 1), torch.zeros(4, 2, 24, 1)
    queries, memory = group.queries(packed_1HND), group.memory(kept_BHKD)
    assert queries[:, :, 0, 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert memory.shape == (4, 2, 16, 1)
    assert (queries.data_ptr(), memory.data_ptr()) == (packed_1HND.data_ptr(), kept_BHKD.data_ptr())


def test_a_group_reads_its_own_rows_of_the_memory() -> None:
    kept_BHKD = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 1)
    prompts, rows = groups()
    assert prompts.memory(kept_BHKD)[:, 0, :, 0].tolist() == [[0] * 3, [1] * 3]
    assert rows.memory(kept_BHKD).shape == (4, 1, 8, 1)
    (alone,) = groups([Piece(2, 0, [1, 2], [1])])
    assert alone.memory(kept_BHKD)[:, 0, :, 0].tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("kind", "window", "expected"),
    [
        ("full_attention", None, [[0], [0, 1, 2], [0, 1, 2, 3, 4]]),
        ("full_attention", 2, [[0], [0, 1, 2], [0, 1, 2, 3, 4]]),
        ("sliding_attention", None, [[0], [0, 1, 2], [0, 1, 2, 3, 4]]),
        ("sliding_attention", 2, [[0], [1, 2], [3, 4]]),
        ("sliding_attention", 1, [[0], [2], [4]]),
        ("sliding_attention", 4, [[0], [0, 1, 2], [1, 2, 3, 4]]),
    ],
)
def test_a_query_sees_its_window_up_to_itself(kind: str, window: int | None, expected: list[list[int]]) -> None:
    masks = Masks(window, True, torch.float32)
    mask = masks.causal(torch.tensor([[0, 2, 4]]), 6, kind)
    assert mask.shape == (1, 1, 3, 6) and seen(mask) == expected
    assert mask.min() == HIDDEN
    eager = Masks(window, False, torch.bfloat16).causal(torch.tensor([[0, 2, 4]]), 6, kind)
    assert eager.min() == torch.finfo(torch.bfloat16).min and seen(eager) == expected


def test_prompts_need_a_mask_only_where_a_window_is_narrower() -> None:
    for masks, kind, expected in (
        (SDPA, "full_attention", None),
        (Masks(3, True, torch.float32), "sliding_attention", None),  # the longest has three tokens
        (Masks(2, True, torch.float32), "full_attention", None),
        (Masks(2, True, torch.float32), "sliding_attention", [[0], [0, 1], [1, 2]]),
        (Masks(None, False, torch.float32), "full_attention", [[0], [0, 1], [0, 1, 2]]),
    ):
        mask = groups(masks=masks)[0].mask(kind, 1)
        assert (mask if mask is None else seen(mask)) == expected


def test_masks_are_made_once_and_repeated_for_queries_that_share_a_key() -> None:
    """Padding sees slot 0, so that no query sees nothing."""
    _, rows = groups()
    once, thrice = rows.mask("full_attention", 1), rows.mask("full_attention", 3)
    assert rows.mask("full_attention", 3) is thrice
    assert (once.shape, thrice.shape) == ((4, 1, 2, 8), (4, 1, 6, 8))
    assert torch.equal(thrice, torch.cat([once] * 3, 2))
    assert [seen(mask[None]) for mask in once] == [
        [[0], [0]], [[0], [0]], [[*range(6)], [*range(7)]], [[*range(8)], [0]],
    ]  # fmt: skip
    (single,) = groups([Piece(row, 9, [row], [0]) for row in range(4)])
    assert single.mask("full_attention", 3).shape == (4, 1, 1, 16), "one query: its mask is broadcast"


def test_a_chunk_sees_all_before_it_and_itself() -> None:
    (chunk,) = groups([Piece(1, 10, range(256), [255])], rows=2)
    assert (chunk.places.group.kind, chunk.places.keys, chunk.rows_B.tolist()) == ("chunk", 266, [1])
    assert seen(chunk.mask("full_attention", 4)) == [[*range(place + 11)] for place in range(256)]


def plain(query_HD: torch.Tensor, key_HKD: torch.Tensor, value_HKD: torch.Tensor, scale: float) -> torch.Tensor:
    """Of one token that sees all of these keys, each shared by the same number of heads."""
    repeats = len(query_HD) // len(key_HKD)
    key_HKD, value_HKD = (kept.repeat_interleave(repeats, 0) for kept in (key_HKD, value_HKD))
    weights_HK = ((key_HKD * query_HD[:, None]).sum(-1) * scale).softmax(-1)
    return (weights_HK[:, :, None] * value_HKD).sum(1)


@st.composite
def some_pieces(draw: st.DrawFn) -> list[Piece]:
    rows = draw(st.permutations(range(5)))[: draw(st.integers(1, 5))]
    counts = [draw(st.sampled_from([1, 2, 3, 7, 40, 260])) for _ in rows]
    return [
        Piece(row, draw(st.sampled_from([0, 3, 9])), [row] * count, []) for row, count in zip(rows, counts, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(some_pieces(), st.sampled_from([None, 1, 4, 20]), st.sampled_from([(2, 2), (6, 2), (3, 1)]))
def test_every_token_attends_as_if_it_were_alone(pieces, window, heads) -> None:
    """Over random memories: prompts, chunks and rows, with windows, and with heads that share keys."""
    layout = CallLayout.of(pieces, 5, Masks(window, True, torch.float64), CPU)
    noise = torch.Generator().manual_seed(1)
    query_1HND = torch.randn(1, heads[0], len(layout.tokens_N), 4, generator=noise, dtype=torch.float64)
    key_BHKD, value_BHKD = torch.randn(2, 5, heads[1], layout.keys, 4, generator=noise, dtype=torch.float64)
    outputs = []
    for group in layout.groups:
        query, key, value = group.queries(query_1HND), group.memory(key_BHKD), group.memory(value_BHKD)
        mask = group.mask("sliding_attention", heads[0] // heads[1])
        if mask is None:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
            output = output.transpose(1, 2)
        else:
            output = masked_attention(query, key, value, mask, 0.3)
        outputs.append(group.packed(output))
    output_NHD = torch.cat(outputs)
    for place in {0, len(output_NHD) // 2, len(output_NHD) - 1, *range(0, len(output_NHD), 17)}:
        row, end = int(layout.rows_N[place]), int(layout.slots_N[place]) + 1
        reach = slice(0 if window is None else max(0, end - window), end)
        expected = plain(query_1HND[0, :, place], key_BHKD[row, :, reach], value_BHKD[row, :, reach], 0.3)
        torch.testing.assert_close(output_NHD[place], expected)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_a_causal_bias_is_as_good_as_its_mask(heads: tuple[int, int]) -> None:
    noise = torch.Generator().manual_seed(1)
    query_BHQD = torch.randn(1, heads[0], 3, 4, generator=noise)
    key_BHKD, value_BHKD = torch.randn(2, 1, heads[1], 8, 4, generator=noise)
    mask = SDPA.causal(torch.tensor([[5, 6, 7]]), 8, "full_attention").repeat(1, 1, heads[0] // heads[1], 1)
    biased = masked_attention(query_BHQD, key_BHKD, value_BHKD, causal_lower_right(3, 8), None)
    torch.testing.assert_close(biased, masked_attention(query_BHQD, key_BHKD, value_BHKD, mask, None))


def test_lists_on_the_device_keep_their_lengths() -> None:
    one, none, two = on_device([[3], [], [1, 2]], CPU)
    assert (one.tolist(), none.tolist(), two.tolist(), none.dtype) == ([3], [], [1, 2], torch.long)
    assert [aligned(length) for length in (0, 1, 8, 9)] == [0, 8, 8, 16]

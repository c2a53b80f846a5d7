"""A row in work: how it begins, and which coins its open block holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.sampler.requests import Request
from ssgen_ds.sampler.rows import BatchRow, open_row

COINS = [False, True, True, False, True, True]


def row(guess_length: int | None = None, next_coin: int = 0, coins: list[bool] = COINS) -> BatchRow:
    """Three tokens of prompt and a guess for each coin."""
    opened = open_row(Request([7, 8, 9], [10 + t for t in range(len(coins))], coins, 0, guess_length=guess_length))
    opened.next_coin = next_coin
    return opened


def test_a_row_at_its_beginning() -> None:
    one, other = row(), row()
    assert (one.tokens, one.start, one.coin_positions) == ([7, 8, 9, 10, 11, 12, 13, 14, 15], 3, [1, 2, 4, 5])
    assert (one.guess_end, one.cached, one.done, one.lookup) == (6, 0, False, None)
    one.result.tokens.append(1)
    one.tokens.append(1)
    assert (other.result.tokens, len(other.tokens), one.request.prompt_ids) == ([], 9, [7, 8, 9]), "they share nothing"


@pytest.mark.parametrize(
    ("guess_length", "next_coin", "width", "expected"),
    [
        (None, 0, None, [1, 2, 4, 5]),
        (None, 0, 2, [1, 2]),
        (None, 1, 2, [2, 4]),
        (None, 3, 9, [5]),
        (None, 4, None, []),
        (0, 0, None, [1]),  # nothing can be fed after the first coin
        (2, 0, None, [1, 2]),  # position 1 has a guess, 2 has none
        (2, 0, 1, [1]),
        (2, 2, None, [4]),
        (4, 0, None, [1, 2, 4]),
        (5, 0, None, [1, 2, 4, 5]),
    ],
)
def test_the_open_block_ends_at_the_first_coin_without_a_guess(guess_length, next_coin, width, expected) -> None:
    assert row(guess_length, next_coin).block(width) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_the_open_block_is_the_longest_that_can_be_fed(coins, data) -> None:
    """Of the next coins, so many that all but the last have a guess."""
    one = row(data.draw(st.integers(0, len(coins))), data.draw(st.integers(0, sum(coins))), coins)
    width = data.draw(st.none() | st.integers(1, 12))
    coming = one.coin_positions[one.next_coin :][:width]
    fits = [n for n in range(1, len(coming) + 1) if all(t < one.guess_end for t in coming[: n - 1])]
    assert one.block(width) == coming[: max(fits, default=0)]
    assert one.done == (not coming)


def test_look_ups_are_in_the_corpora_and_the_prompt() -> None:
    free = open_row(Request([1, 2], [0, 0, 0], [True] * 3, 0, guess_length=0, corpora=([5, 1, 2, 6, 7],)))
    assert free.lookup is not None and free.lookup.propose(2) == [6, 7]
    own = open_row(Request([1, 2, 3, 1, 2], [0], [True], 0, corpora=()))
    assert own.lookup is not None and own.lookup.propose(1) == [3]


@pytest.mark.parametrize(("coins", "guess"), [([True], []), ([], [1])])
def test_mismatched_request_is_refused(coins, guess) -> None:
    with pytest.raises(ValueError, match=f"guess has {len(guess)} tokens, coins are {len(coins)}"):
        open_row(Request([1], guess, coins, key=0))


def test_requests_that_cannot_be_sampled_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        open_row(Request([], [1], [True], 0))
    with pytest.raises(ValueError, match="look-ups would overwrite gold tokens"):
        open_row(Request([1], [1, 2], [True, False], 0, corpora=()))

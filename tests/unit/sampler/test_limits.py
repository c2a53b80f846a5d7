"""Shares of a rank's free memory, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.sampler.limits import (
    CACHE_SHARE,
    CALL_SHARE,
    FEWEST_TOKENS,
    LOGIT_SHARE,
    MOST_LOGITS,
    MOST_TOKENS,
    call_bytes_per_token,
    call_limit,
    rows_that_fit,
)
from ssgen_ds.sampler.requests import CallLimit


@pytest.mark.parametrize(
    ("adapter_element", "element", "expected"),
    [
        (0, 2, (3 * 100 + 4 * 10) * 2),  # gate, up and their product
        (2, 2, (4.25 * 100 + 4 * 10) * 2),  # and LoRA's outputs
        (4, 2, (6.75 * 100 + 4 * 10) * 2),  # in float32 beside bfloat16
        (4, 4, (4.25 * 100 + 4 * 10) * 4),
    ],
)
def test_bytes_of_a_token(adapter_element: int, element: int, expected: float) -> None:
    assert call_bytes_per_token(10, 100, adapter_element, element) == expected


def test_a_call_takes_a_fifth_for_activations_and_a_tenth_for_logits() -> None:
    assert call_limit(1e6, token_bytes=1000, logit_bytes=10_000, rows=4) == CallLimit(tokens=200, logits=10)
    assert call_limit(1e6, token_bytes=1001, logit_bytes=10_001, rows=4) == CallLimit(tokens=199, logits=9)


def test_a_call_without_memory_still_feeds_some_tokens_and_a_logit_a_row() -> None:
    assert call_limit(0.0, token_bytes=1000, logit_bytes=10_000, rows=4) == CallLimit(FEWEST_TOKENS, 4)


def test_more_than_makes_a_call_faster_is_never_taken() -> None:
    for token_bytes, logit_bytes in ((1, 1), (0, 0)):
        assert call_limit(1e12, token_bytes, logit_bytes, rows=4) == CallLimit(MOST_TOKENS, MOST_LOGITS)


def test_rows_that_fit() -> None:
    """Whole rows, one at least, and no more than asked for, also where a row takes no memory."""
    assert [rows_that_fit(free, 300.0, 64) for free in (0, 299, 899, 900, 1e6)] == [1, 1, 2, 3, 64]
    assert rows_that_fit(100.0, 0.0, 64) == 64


@given(st.floats(0, 1e11), st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 64), st.floats(1, 1e9))
def test_all_three_fit_in_what_is_free(free, token_bytes, logit_bytes, rows, row_bytes) -> None:
    """But for the least that each of them gets."""
    limit, fitting = call_limit(free, token_bytes, logit_bytes, rows), rows_that_fit(CACHE_SHARE * free, row_bytes, 64)
    assert FEWEST_TOKENS <= limit.tokens <= MOST_TOKENS and rows <= limit.logits <= MOST_LOGITS
    assert limit.tokens == FEWEST_TOKENS or limit.tokens * token_bytes <= CALL_SHARE * free
    assert limit.logits == rows or limit.logits * logit_bytes <= LOGIT_SHARE * free
    assert fitting == 1 or fitting * row_bytes <= CACHE_SHARE * free
    assert CACHE_SHARE + CALL_SHARE + LOGIT_SHARE < 1

"""The look-up against its definition, which searches everything for every answer."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.sampler.lookup import SHORTEST, Lookup

texts = st.lists(st.integers(0, 2), max_size=12)  # few different tokens: many matches, many ties


def defined(corpora: list[list[int]], text: list[int], count: int) -> list[int]:
    """What follows the first occurrence of the longest suffix of the text that has one, corpora before the text."""
    for length in range(len(text), SHORTEST - 1, -1):
        suffix = text[-length:]
        first = next(
            (
                (source, begin + length)
                for source in [*corpora, text]
                for begin in range(len(source) - length + (source is not text))
                if source[begin : begin + length] == suffix
            ),
            None,
        )
        if first is not None and first[1] < len(first[0]):
            source, begin = first
            followed = list(source)
            while source is text and len(followed) < begin + count:
                followed.append(followed[begin + len(followed) - len(text)])
            return followed[begin : begin + count]
    return []


@settings(max_examples=500, deadline=None)
@given(st.lists(texts, max_size=3), texts, texts, st.integers(0, 6))
def test_equals_the_definition(corpora, prompt, generated, count):
    lookup = Lookup(corpora, prompt)
    assert lookup.propose(count) == defined(corpora, prompt, count)
    for i, token in enumerate(generated):
        lookup.append(token)
        assert lookup.propose(count) == defined(corpora, [*prompt, *generated[: i + 1]], count)


def test_follows_the_longest_match_then_the_first_corpus():
    previous, gold = [7, 8, 9, 1, 2], [5, 8, 9, 3, 4]
    assert Lookup([previous, gold], [8, 9]).propose(4) == [1, 2]
    assert Lookup([previous, gold], [5, 8, 9]).propose(1) == [3]
    assert Lookup([gold, previous], [8, 9]).propose(2) == [3, 4]
    assert Lookup([previous, gold], [9]).propose(2) == [], "one token is no match"
    assert Lookup([[1, 2], [3, 4]], [2, 3]).propose(2) == [], "no match across corpora"
    assert Lookup([previous], [3, 1, 2]).propose(2) == [], "nothing follows"


def test_a_loop_is_proposed_as_often_as_it_fits():
    assert Lookup([], [4, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_draft_that_is_repeated_is_followed_to_its_end():
    draft = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
    lookup = Lookup([draft], [0])
    for position, token in enumerate(draft[:-1], start=1):
        if position > SHORTEST:
            assert lookup.propose(99) == draft[position - 1 :]
        lookup.append(token)


def test_time_is_linear_even_in_the_worst_text():
    """40,000 equal tokens: a scan for each would take minutes."""
    start = time.perf_counter()
    lookup = Lookup([[1] * 20_000], [2])
    for _ in range(20_000):
        lookup.append(1)
        lookup.propose(1)
    assert time.perf_counter() - start < 10

"""What was generated for a slot: which tokens count as the draft, and which response the model reads."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from ssgen_ds.sampler.free import FreeSample, free_sample
from ssgen_ds.sampler.requests import Sampled
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Target

STOP = 99


@pytest.mark.parametrize(("kept", "expected"), [(0, []), (2, [5, 6]), (3, [5, 6, 7])])
def test_the_cut_keeps_the_beginning_of_a_draft(kept: int, expected: list[int]) -> None:
    """The stop id was sampled, but it is no token of the draft."""
    draft = Draft([5, 6, 7], STOP, kept)
    assert (draft.kept_ids, draft.ids, draft.sampled_ids) == (expected, [5, 6, 7], [5, 6, 7, STOP])


def test_a_draft_that_had_no_room_to_stop_has_no_stop_id() -> None:
    draft = Draft([5, 6], None, 2)
    assert draft.sampled_ids == draft.kept_ids == [5, 6]


def test_a_draft_is_made_of_what_the_sampler_gave() -> None:
    """The last token of a sample that stopped is its stop id."""
    for sampled, expected in (
        (Sampled([5, 6, STOP], stopped=True), FreeSample([5, 6], STOP)),
        (Sampled([STOP], stopped=True), FreeSample([], STOP)),
        (Sampled([5, 6]), FreeSample([5, 6], None)),
    ):
        found = free_sample(sampled)
        assert found == expected
        assert Draft(found.ids, found.stop_id, len(found.ids)).sampled_ids == sampled.tokens


def test_the_context_is_gold_until_it_is_mixed() -> None:
    generated = Generated(3, "x", 0, 0.25, [1, 2, 3])
    assert generated.context_ids == [1, 2, 3]
    generated.draft, generated.target = Draft([9], None, 1), Target([1, 2, 3], "reference")
    assert generated.context_ids == [1, 2, 3], "a draft and a correction change nothing of it"
    generated.mixed = Mixed([False, True, False], [1, 8, 3], passes=2)
    assert (generated.context_ids, generated.gold_ids) == ([1, 8, 3], [1, 2, 3])


def test_nothing_is_generated_at_first() -> None:
    generated = Generated(3, "x", 0, 0.0, [1])
    assert (generated.mixed, generated.draft, generated.rewrite, generated.target) == (None, None, None, None)
    assert generated == Generated(3, "x", 0, 0.0, [1]) != Generated(3, "x", 1, 0.0, [1])


def test_what_was_sampled_does_not_change() -> None:
    mixed, draft = Mixed([True], [4], 1), Draft([4], None, 1)
    with pytest.raises(FrozenInstanceError):
        mixed.ids = []  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        draft.kept = 0  # type: ignore[misc]

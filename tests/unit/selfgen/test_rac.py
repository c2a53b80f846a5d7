"""What of a draft is kept, the correction sequence, and which rewrites are targets."""

from __future__ import annotations

import pytest

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import IGNORE
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.selfgen import rac


def test_cut_keeps_a_random_prefix():
    keys = [sequence_key(0, Stream.CUT, str(i), 0) for i in range(3000)]
    kept = [rac.kept_length(4, "uniform", key) for key in keys]
    assert {1, 2, 3, 4} == set(kept)
    assert all(650 < kept.count(length) < 850 for length in range(1, 5))
    assert rac.kept_length(4, "none", keys[0]) == 4
    assert rac.kept_length(0, "uniform", keys[0]) == 0


def test_a_correction_reads_prompt_draft_and_cue_and_predicts_its_target():
    example = Example("a", [5, 6], None, [7, 2], False, "gold")
    sequence = rac.correction_sequence(example, [30, 31], [40], [7, 2], 0.25)
    assert sequence.input_ids == [5, 6, 30, 31, 40, 7, 2]
    assert sequence.labels == [IGNORE] * 5 + [7, 2] and sequence.weight == 0.25


@pytest.mark.parametrize(
    ("rewrite", "draft", "is_target"), [(0.6, 0.5, True), (0.5, 0.5, False), (0.4, 0.5, False), (1.0, 1.0, True)]
)
def test_a_rewrite_is_a_target_when_it_is_closer_or_right(rewrite: float, draft: float, is_target: bool):
    assert rac.accept_rewrite(rewrite, draft) is is_target

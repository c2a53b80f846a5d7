"""Self-generation on two ranks: the same tokens as in one process, and no trace of it in training."""

from __future__ import annotations

import pytest

from ssgen_ds.selfgen.round_file import to_row
from tests.support.rank_runs import (
    assert_generation_leaves_training_as_it_was,
    fresh,
    tokens_of,
    trained,
    uneven_answers,
    zero,
)
from tests.support.ranks import ranks


@ranks(2)
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_generation_leaves_training_as_it_was(world, folder, stage, adapter):
    assert_generation_leaves_training_as_it_was(world, folder, adapter, zero(stage))


@ranks(1, 2)
@pytest.mark.parametrize("number", [1, 5])
def test_uneven_generation_ends_and_is_the_same_everywhere(world, folder, kept, number):
    """Requests that end at different steps, or fewer requests than ranks."""
    if world.size == 1:
        kept["alone"] = uneven_answers(world, folder, number, deepspeed=zero(0))
        if number == 5:
            assert len({len(tokens) for tokens in kept["alone"]}) > 2, "they must be uneven to mean anything"
        return
    for stage in (0, 3):
        assert uneven_answers(world, folder, number, deepspeed=zero(stage)) == kept["alone"]


@ranks(1, 2)
def test_rewrites_are_the_same_on_two_sharded_ranks(world, folder, kept):
    """Drafts, cuts, rewrites and targets of ZeRO-3 on two ranks are those of one process, bit for bit."""
    recipe = fresh(
        folder,
        "rewrite",
        world,
        deepspeed=zero(0 if world.size == 1 else 3),
        method__name="rac",
        method__rac__target="rewrite",
        method__rac__cut="uniform",
        method__rac__rewrite_cue="Gold: {reference}",
        data__max_response_tokens=12,
    )
    generated = [to_row(item) for group in tokens_of(trained(recipe, world)) for item in group]
    if world.size == 1:
        kept["alone"] = generated
        return
    assert generated == kept["alone"]
    assert len(generated) == 4 * 6
    drafted = [item for item in generated if item["draft_ids"]]
    assert drafted
    assert all(item["rewrite_ids"] is not None and item["target_ids"] for item in drafted)
    assert all(1 <= item["draft_kept"] <= len(item["draft_ids"]) for item in drafted)
    assert any(item["draft_kept"] < len(item["draft_ids"]) for item in drafted)

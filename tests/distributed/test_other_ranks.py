"""A run that goes on with another number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.recipe.schema import Recipe
from tests.support.rank_runs import column, stopped_often, tokens_of, told, trained, zero
from tests.support.ranks import ranks
from tests.support.tiny_runs import tiny_recipe

RESHARDED: dict[str, dict[str, Any]] = {
    "none-1": {"deepspeed": zero(1)},
    "none-2": {"deepspeed": zero(2)},
    "none-3": {"deepspeed": zero(3)},
    "lora-3": {"deepspeed": zero(3), "adapter__kind": "lora"},
    "cross": {"deepspeed": zero(3)},  # goes on at another ZeRO stage
    "8bit": {"deepspeed": zero(2), "train__optimizer": "adamw_8bit"},  # moments are quantised again
}


def recipe_of(folder: Path, name: str, who: str, **more: Any) -> Recipe:
    settings = {"method__name": "bss+rac", "train__max_steps": 6, **RESHARDED[name], **more}
    return tiny_recipe(folder, folder / "other-ranks" / f"{who}-{name}", adapter__rank=4, **settings)


@pytest.fixture(scope="module")
def whole_of(world, folder) -> Callable[[str], Path]:
    """The run of a name in one go, on these ranks."""
    return functools.cache(lambda name: trained(recipe_of(folder, name, "whole"), world))


@pytest.mark.parametrize("name", RESHARDED)
@pytest.mark.parametrize("origin", [pytest.param(1, marks=ranks(1, 2)), pytest.param(2, marks=ranks(2, 1))])
def test_another_number_of_ranks_goes_on_with_the_same_examples_and_noise(world, folder, whole_of, kept, name, origin):
    """From `origin` ranks to the other number, against two ranks throughout."""
    if world.size == 2:
        kept["losses"], kept["tokens"] = column(whole_of(name), "loss"), tokens_of(whole_of(name))
    if world.size == origin:
        stopped_often(recipe_of(folder, name, f"from{origin}"), world, 3)  # three of six steps
        return
    more = {"deepspeed": zero(1)} if name == "cross" else {}
    with told("ssgen_ds.checkpoint.choose", "ssgen_ds.training.foundations") as said:
        run = trained(recipe_of(folder, name, f"from{origin}", **more), world)
    assert column(run, "step") == [1, 2, 3, 4, 5, 6]
    differences = [abs(a - b) for a, b in zip(column(run, "loss"), kept["losses"], strict=True)]
    assert max(differences) < (0.05 if name == "8bit" else 1e-5)
    assert tokens_of(run) == kept["tokens"] or name == "8bit"  # other blocks, other rounding
    said = world.broadcast(said)
    assert f"with ranks {origin}, now {3 - origin}" in said[0]
    assert len(said) == (2 if name == "cross" else 1)

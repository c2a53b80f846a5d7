"""The shipped recipes on the model and data that they name."""

import pytest

from tests.distributed.recipe_cases import RECIPES


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_shipped_recipe_trains(run_cases, name):
    assert run_cases("tests.distributed.recipe_cases", 1)[name] is True

"""Sentences for what is wrong with a nested dictionary, and the model of the rest, on a schema of three sections."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from ssgen_ds.recipe.validation import validate


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rates(Strict):
    lr: Annotated[float, Field(gt=0)] = 0.5
    warmup: int = 0


class Source(Strict):
    path: str
    weight: float = 1.0


class Whole(Strict):
    name: str
    rates: Rates = Rates()
    sources: list[Source] = []


GOOD: dict[str, Any] = {"name": "n", "rates": {"lr": 2.0}, "sources": [{"path": "a"}, {"path": "b", "weight": 3}]}
STAND_IN = {"name": "-"}


def test_nothing_is_wrong() -> None:
    assert validate(Whole, GOOD, STAND_IN) == (Whole(**GOOD), [])


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"rate": {}}, "rate: unknown key; did you mean rates?"),
        ({"rates": {"wramup": 1}}, "rates.wramup: unknown key; did you mean rates.warmup?"),
        ({"rates": {"learning_rate": 1}}, "rates.learning_rate: unknown key; did you mean rates.lr?"),
        ({"rates": {"lerning_rate": 1}}, "rates.lerning_rate: unknown key; did you mean rates.lr?"),
        ({"rates": {"zzz": 1}}, "rates.zzz: unknown key"),
        ({"learning_rate": 1}, "learning_rate: unknown key"),  # this section has no lr
        ({"sources": [{"path": "a"}, {"path": "b", "wieght": 1}]},
         "sources.1.wieght: unknown key; did you mean sources.1.weight?"),
        ({"sources": [{"weight": 1}]}, "sources.0.path: required, but not given"),
        ({"rates": {"lr": -1}}, "rates.lr: input should be greater than 0, got -1"),
        ({"rates": {"warmup": "x"}},
         "rates.warmup: input should be a valid integer, unable to parse string as an integer, got 'x'"),
    ],
)  # fmt: skip
def test_a_sentence_names_the_key_and_the_nearest_known_one(raw: dict, sentence: str) -> None:
    model, problems = validate(Whole, {"name": "n", **raw}, STAND_IN)
    assert problems == [sentence]
    assert model is None or model.name == "n"


def test_all_problems_come_at_once_with_the_model_of_the_rest() -> None:
    """A faulty key has its default, a faulty source takes its list with it, and a missing name its stand-in."""
    raw = {"rates": {"lr": 0, "warmup": 7, "x": 1}, "sources": [{"path": "a"}, {"path": 3}], "y": 2}
    before = copy.deepcopy(raw)
    model, problems = validate(Whole, raw, STAND_IN)
    assert [problem.split(":")[0] for problem in problems] == ["name", "rates.lr", "rates.x", "sources.1.path", "y"]
    assert model == Whole(name="-", rates=Rates(warmup=7))
    assert raw == before


def test_a_section_that_is_none_is_left_out() -> None:
    model, (problem,) = validate(Whole, {"name": "n", "rates": 3}, STAND_IN)
    assert problem.startswith("rates: input should be a valid dictionary") and problem.endswith(", got 3")
    assert model == Whole(name="n")


class Outer(Strict):
    source: Source
    whole: Whole


def test_stand_ins_reach_into_sections_and_yield_to_what_is_given() -> None:
    required = {"source": {"path": "-"}, "whole": {"name": "-"}}
    model, problems = validate(Outer, {"source": {"weight": 4}, "whole": {"name": "mine", "x": 0}}, required)
    assert problems == ["source.path: required, but not given", "whole.x: unknown key"]
    assert model == Outer(source=Source(path="-", weight=4), whole=Whole(name="mine"))
    assert validate(Outer, {}, {"source": {"path": "-"}})[0] is None, "nothing stands in for `whole`"


keys = st.text("abcxyz", min_size=1, max_size=3)


@given(st.dictionaries(keys, st.integers()), st.dictionaries(keys, st.none()))
def test_unknown_keys_are_all_named_and_change_nothing_else(above: dict, below: dict) -> None:
    model, problems = validate(Whole, {**GOOD, **above, "rates": {"lr": 2.0, **below}}, STAND_IN)
    assert model == Whole(**GOOD)
    assert {problem.split(":")[0] for problem in problems} == {*above, *(f"rates.{key}" for key in below)}

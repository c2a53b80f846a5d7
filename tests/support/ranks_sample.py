"""Tests on ranks that pass, fail and are left out: what `test_ranks.py` runs."""

from __future__ import annotations

import pytest

from tests.support.ranks import on_each, ranks


@pytest.fixture(scope="module")
def counted() -> list[int]:
    return []


@ranks(2)
def test_passes(world, counted):
    counted.append(world.rank)
    assert world.sum(1) == [2]


@ranks(2)
def test_fails_on_rank_1(world, counted):
    print("a word of rank", world.rank)
    counted.append(world.rank)
    assert world.rank == 0, "on purpose"


@ranks(2)
def test_a_fixture_of_the_module_lasts(world, counted):
    assert counted == [world.rank] * 2


@ranks(2)
def test_is_left_out(world):
    pytest.skip("no need")


@ranks(2)
@pytest.mark.xfail(strict=True, reason="known")
def test_fails_as_expected(world):
    raise AssertionError


@ranks(1, 2)
@pytest.mark.parametrize("number", [7, 8])
def test_keeps_for_two_ranks_what_one_has_found(world, folder, kept, number):
    if world.size == 1:
        kept["found"] = number
        return
    assert kept["found"] == number
    assert (folder / "train.jsonl").is_file()


@ranks(1, 2)
def test_fails_before_its_last_number(world):
    assert world.size == 2, "not here"


@on_each(1, 2)
def test_runs_on(world, size):
    assert world.size == size


def test_is_an_ordinary_one(tmp_path):
    assert tmp_path.is_dir()

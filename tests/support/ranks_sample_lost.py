"""Tests on ranks that die and hang: what `test_ranks.py` runs."""

from __future__ import annotations

import os
import time

from tests.support.ranks import ranks


@ranks(2)
def test_before(world):
    world.barrier()


@ranks(2)
def test_rank_1_dies(world):
    if world.rank == 1:
        print("last words", flush=True)
        os._exit(3)
    world.barrier()


@ranks(2)
def test_after(world):
    world.barrier()


@ranks(1)
def test_with_other_ranks(world):
    assert world.size == 1


@ranks(1)
def test_hangs(world):
    time.sleep(1000)

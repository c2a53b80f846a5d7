"""How sequences are dealt out to ranks and micro batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.data.window import shard_by_length


def test_shard_by_hand() -> None:
    assert shard_by_length([5, 1, 4, 2], 1, 2) == [[[0, 2], [3, 1]]]
    assert shard_by_length([5, 1, 4, 2], 2, 4) == [[[0, 2]], [[3, 1]]]
    # Two rounds: 9 and 8 first, then the shorter of the rest goes to the rank that got 9.
    assert shard_by_length([9, 8, 3, 1], 2, 1) == [[[0], [3]], [[1], [2]]]
    assert shard_by_length([], 2, 4) == [[], []]
    assert shard_by_length([7], 3, 4) == [[[0]], [], []]


@given(lengths=st.lists(st.integers(1, 500), max_size=60), world=st.integers(1, 9), micro_batch=st.integers(1, 8))
def test_shards_partition(lengths: list[int], world: int, micro_batch: int) -> None:
    shards = shard_by_length(lengths, world, micro_batch)
    assert len(shards) == world
    dealt = [index for rank in shards for micro in rank for index in micro]
    assert sorted(dealt) == list(range(len(lengths)))
    assert all(1 <= len(micro) <= micro_batch for rank in shards for micro in rank)
    counts = [len(rank) for rank in shards]
    assert max(counts) - min(counts) <= (1 if len(lengths) < max(counts) * world else 0)
    assert max(counts) == -(-len(lengths) // (micro_batch * world))  # no more micro batches than needed
    # Balance: ranks differ by no more than the two heaviest micro batches' worth.
    tokens = [sum(lengths[i] for micro in rank for i in micro) for rank in shards]
    heaviest = max((sum(lengths[i] for i in micro) for rank in shards for micro in rank), default=0)
    assert max(tokens) - min(tokens) <= heaviest


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_shards_of_any_world_hold_the_same_examples(seed: int, world: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 99, 24).tolist()
    alone = {i for micro in shard_by_length(lengths, 1, 4)[0] for i in micro}
    assert {i for rank in shard_by_length(lengths, world, 4) for micro in rank for i in micro} == alone

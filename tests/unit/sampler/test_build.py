from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.build import cache_bytes_per_token, choose_strategy
from ssgen_ds.sampler.engine import BatchLimit, deal
from ssgen_ds.sampler.requests import Request
from ssgen_ds.sampler.strategy import Dequantized, Gathered, Local, Sharded
from tests.support.tiny_models import FAMILIES, tiny_model

SHARDS = SimpleNamespace(total_bytes=900.0, largest_unit_bytes=100.0)  # 1000 bytes more when gathered


def world_of(*free: float) -> SimpleNamespace:
    """Two ranks; `max` is over -free of all of them."""
    return SimpleNamespace(size=2, max=lambda value: max(value, *(-other for other in free)))


@pytest.mark.parametrize(
    ("setting", "mine", "other", "expected"),
    [
        ("auto", 1260.0, 1260.0, "gathered"),
        ("auto", 1240.0, 1240.0, "sharded"),
        ("auto", 9e9, 1240.0, "sharded"),  # the rank with the least decides
        ("auto", -5.0, 9e9, "sharded"),
        ("gathered", 0.0, 0.0, "gathered"),
        ("sharded", 9e9, 9e9, "sharded"),
    ],
)
def test_gathered_where_it_fits(setting, mine, other, expected):
    world = world_of(other)
    chosen, reason = choose_strategy(setting, Sharded(SHARDS, world), Gathered(SHARDS), mine, world)
    assert chosen.name == expected
    assert chosen.held_bytes == (900.0 if expected == "gathered" else 0)
    assert "GiB are free" in reason


def test_whole_parameters_need_no_strategy():
    assert choose_strategy("gathered", Local(), None, 0.0, world_of(0.0))[0].name == "local"


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=0, max_size=25)


def requests_of(sizes) -> list[Request]:
    return [Request([0] * prompt, [0] * response, [True] * response, key=0) for prompt, response in sizes]


@given(lengths, st.integers(1, 5))
def test_ranks_get_a_partition_longest_first(sizes, ranks):
    requests = requests_of(sizes)
    shares = [deal(requests, rank, ranks) for rank in range(ranks)]
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        totals = [sum(sizes[i]) for i in share]
        assert totals == sorted(totals, reverse=True)


@given(lengths, st.integers(1, 64), st.integers(0, 2000), st.integers(0, 7))
def test_rows_respect_both_limits_and_are_at_least_one(sizes, most, cache_bytes, per_token):
    rows = BatchLimit(most, float(cache_bytes), per_token).rows_for(requests_of(sizes))
    longest = max(map(sum, sizes), default=0)
    assert 1 <= rows <= most
    assert rows == 1 or rows * longest * per_token <= cache_bytes
    assert rows == most or (rows + 1) * max(1, longest * per_token) > cache_bytes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_bytes_are_those_of_the_real_cache(family):
    model = tiny_model(family)
    cached = CachedCausalLM(model)
    cached.open(2, 16)
    cached([Piece(row, 0, [1, 1, 1], [2]) for row in range(2)])
    tensors = [tensor for layer in cached._layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) == 2 * 16 * cache_bytes_per_token(model)


@pytest.mark.parametrize(
    ("setting", "mine", "other", "expected"),
    [
        ("auto", 1260.0, 1260.0, "dequantized"),
        ("auto", 9e9, 1240.0, "local"),  # the rank with the least decides
        ("gathered", 0.0, 0.0, "dequantized"),
        ("sharded", 9e9, 9e9, "local"),
    ],
)
def test_a_quantised_base_is_dequantised_where_it_fits(setting, mine, other, expected):
    chosen, reason = choose_strategy(setting, Local(), Dequantized(None, 1000), mine, world_of(other))
    assert chosen.name == expected
    assert chosen.held_bytes == (1000 if expected == "dequantized" else 0)
    assert "GiB are free" in reason

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.sampler.draw import Previous, draw_tokens
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.noise import gumbel

V, KEYS = 6, 2000


def draw(logits_NV: torch.Tensor, keys: list[int], sampling=None, previous=None):
    n = len(keys)
    return draw_tokens(logits_NV, keys, [3] * n, sampling or Sampling(), [True] * n, previous or [None] * n)


def logits_of(seed: int) -> torch.Tensor:
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def test_token_is_the_argmax_with_noise_and_log_prob_that_of_the_filtered_softmax():
    logits_NV = torch.stack([logits_of(i) for i in range(40)])  # more rows than are worked on at once
    keys = [17 * i for i in range(40)]
    sampling = Sampling(temperature=0.7, top_k=4, banned_ids=(2,))
    scores_NV = sampling.scores(logits_NV)
    expected_N = (scores_NV + gumbel(torch.tensor(keys), torch.full((40,), 3), V)).argmax(-1).tolist()
    draws = draw(logits_NV, keys, sampling)
    assert [item.token for item in draws] == expected_N
    logs_NV = scores_NV.log_softmax(-1)
    for row, item in enumerate(draws):
        assert item.log_prob == pytest.approx(logs_NV[row, item.token].item(), abs=1e-5)
        assert item.moved == 0.0


def test_moved_by_hand():
    """q = (1/2, 1/4, 1/4); the last draw's token had p = 3/4, 1/8 and 1/4."""
    logits_NV = torch.tensor([[0.5, 0.25, 0.25]] * 3).log()
    previous = [Previous(0, log(0.75)), Previous(1, log(0.125)), Previous(2, log(0.25))]
    moved = [item.moved for item in draw(logits_NV, [1, 2, 3], previous=previous)]
    assert moved == pytest.approx([1 - 0.5 / 0.75, 0.0, 0.0], abs=1e-6)


def test_a_token_that_is_now_impossible_has_moved_all_the_way():
    (item,) = draw(torch.zeros(1, V), [1], Sampling(banned_ids=(4,)), [Previous(4, log(0.5))])
    assert item.moved == 1.0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_moved_estimates_total_variation_and_bounds_the_flips(seed, other, share):
    """Over many keys: E[moved] = TV(p, q), and P(flip) <= 2 TV / (1 + TV) with common noise."""
    p, q = logits_of(seed), (1 - share) * logits_of(seed) + share * logits_of(other)
    tv = 0.5 * (p.double().softmax(-1) - q.double().softmax(-1)).abs().sum().item()
    keys = [7919 * i + seed for i in range(KEYS)]
    first = draw(p.expand(KEYS, V), keys)
    second = draw(q.expand(KEYS, V), keys, previous=[Previous(item.token, item.log_prob) for item in first])
    error = 4.5 * 0.5 / KEYS**0.5  # of a mean of values in [0, 1]
    assert sum(item.moved for item in second) / KEYS == pytest.approx(tv, abs=error)
    flips = sum(a.token != b.token for a, b in zip(first, second, strict=True)) / KEYS
    assert flips <= 2 * tv / (1 + tv) + error
    assert flips >= tv - error  # no coupling of p and q flips less often


def test_greedy_takes_the_best_and_flags_ties():
    logits_NV = torch.tensor([[0.0, 1.0, 1.0005], [0.0, 3.0, 1.0]])
    for keys in ([1, 2], [3, 4]):  # no noise: the key says nothing
        draws = draw(logits_NV, keys, Sampling(temperature=0.0), [None, Previous(0, -1.0)])
        assert [item.token for item in draws] == [2, 1]
        assert [item.tied for item in draws] == [True, False]
        assert [item.moved for item in draws] == [0.0, 0.0]


def test_sampled_ties_are_those_of_the_noisy_scores():
    noise_V = gumbel(torch.tensor([5]), torch.tensor([3]), 3)[0]
    tied = torch.tensor([0.0, 0.0005, -9.0]) - torch.tensor([*noise_V[:2].tolist(), 0.0])
    clear = torch.tensor([0.0, 0.5, -9.0]) - torch.tensor([*noise_V[:2].tolist(), 0.0])
    assert [item.tied for item in draw(torch.stack([tied, clear]), [5, 5])] == [True, False]

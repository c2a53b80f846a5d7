import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import Request, count_mismatches, sample_fixed_point
from ssgen_ds.sampler.noise import Stream, gumbel, sequence_key
from tests.support.toy_model import ToyModel

V = 7


def sequential(model: ToyModel, request: Request, sampling: Sampling) -> list[int]:
    """The definition, token by token, without a cache."""
    tokens = list(request.prompt_ids)
    for t, (coin, gold) in enumerate(zip(request.coins, request.guess_ids, strict=True)):
        token = gold
        if coin:
            scores = sampling.scores(model.logits(tokens)[None])
            if not sampling.greedy:
                scores = scores + gumbel(torch.tensor([request.key]), torch.tensor([t]), V)
            token = int(scores.argmax())
        tokens.append(token)
        if coin and token in request.stop_ids:
            break
    return tokens[len(request.prompt_ids) :]


@st.composite
def requests(draw) -> Request:
    length = draw(st.integers(1, 12))
    ids = st.integers(0, V - 1)
    return Request(
        prompt_ids=draw(st.lists(ids, min_size=1, max_size=6)),
        guess_ids=draw(st.lists(ids, min_size=length, max_size=length)),
        coins=draw(st.lists(st.booleans(), min_size=length, max_size=length)),
        key=sequence_key(draw(st.integers(0, 99)), Stream.BSS, "x", 0),
        stop_ids=frozenset(draw(st.sets(ids, max_size=2))),
    )


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    banned_ids=st.sampled_from([(), (2,)]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=5), samplings, st.sampled_from([None, 1, 2, 5]))
def test_equals_sequential_sampling(batch, sampling, block):
    """Whatever the lengths, coins, stops, filters, block size and batch: the definition's tokens."""
    model = ToyModel(V)
    results, stats_ = sample_fixed_point(model, batch, sampling, block)
    assert [result.tokens for result in results] == [sequential(model, request, sampling) for request in batch]
    assert stats_.calls == model.calls == max((result.passes for result in results), default=0)
    assert stats_.token_forwards == model.token_forwards
    for request, result in zip(batch, results, strict=True):
        assert result.passes <= sum(request.coins)


@settings(max_examples=60, deadline=None)
@given(requests(), st.lists(st.integers(0, V - 1), min_size=12, max_size=12), st.sampled_from([None, 1, 3]))
def test_the_guess_at_coins_changes_cost_not_tokens(request_, garbage, block):
    guess = [
        garbage[t] if coin else gold
        for t, (coin, gold) in enumerate(zip(request_.coins, request_.guess_ids, strict=True))
    ]
    other = Request(request_.prompt_ids, guess, request_.coins, request_.key, request_.stop_ids)
    (one,), _ = sample_fixed_point(ToyModel(V), [request_], Sampling(), block)
    (two,), _ = sample_fixed_point(ToyModel(V), [other], Sampling(), block)
    assert one.tokens == two.tokens


def test_a_right_guess_needs_one_pass():
    request = Request([1, 2], [0] * 10, [True] * 10, key=3)
    (first,), _ = sample_fixed_point(ToyModel(V), [request], Sampling(), 1)
    again = Request([1, 2], first.tokens, [True] * 10, key=3)
    (second,), cost = sample_fixed_point(ToyModel(V), [again], Sampling(), None)
    assert second.tokens == first.tokens
    assert (second.passes, second.flips, cost.calls) == (1, 0, 1)


def test_no_coins_no_calls():
    model = ToyModel(V)
    (result,), _ = sample_fixed_point(model, [Request([1], [4, 5], [False, False], key=0)], Sampling(), None)
    assert result.tokens == [4, 5]
    assert model.calls == 0


def test_coin_to_coin_feeds_every_token_once():
    """Block 1: a run of gold tokens is one call, nothing is computed twice, nothing after the last coin."""
    coins = [False, True, False, False, True, False, False]
    model = ToyModel(V)
    sample_fixed_point(model, [Request([1, 2, 3], [0] * 7, coins, key=0)], Sampling(), 1)
    assert model.calls == 2
    assert model.token_forwards == 3 + 4  # the prompt and response positions 0..3; position 4 is the last coin


def test_stop_ends_the_row_and_nothing_follows():
    model = ToyModel(V)
    request = Request([1], [0] * 30, [True] * 30, key=11, stop_ids=frozenset({0, 1, 2}))
    for block in (1, 4, None):
        (result,), _ = sample_fixed_point(model, [request], Sampling(), block)
        assert result.stopped
        assert result.tokens[-1] in request.stop_ids
        assert not set(result.tokens[:-1]) & request.stop_ids


def test_samples_follow_the_softmax():
    """Chi-square of one position over many keys against the filtered distribution."""
    model = ToyModel(V, sharpness=1.0)
    sampling = Sampling(temperature=0.8, top_k=5, banned_ids=(3,))
    batch = [Request([1, 2], [0], [True], key=sequence_key(0, Stream.BSS, str(i), 0)) for i in range(4000)]
    results, _ = sample_fixed_point(model, batch, sampling, None)
    observed = torch.bincount(torch.tensor([result.tokens[0] for result in results]), minlength=V)
    expected = sampling.scores(model.logits([1, 2])[None])[0].double().softmax(-1) * 4000
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible].numpy(), expected[possible].numpy()).pvalue > 1e-3


def test_conditional_samples_follow_the_softmax():
    """The second of two sampled positions, given the first, in the parallel iteration."""
    model = ToyModel(V, sharpness=1.0)
    batch = [Request([1, 2], [0, 0], [True, True], key=sequence_key(5, Stream.BSS, str(i), 0)) for i in range(6000)]
    results, _ = sample_fixed_point(model, batch, Sampling(), None)
    first = int(torch.mode(torch.tensor([result.tokens[0] for result in results])).values)
    second = [result.tokens[1] for result in results if result.tokens[0] == first]
    observed = torch.bincount(torch.tensor(second), minlength=V)
    expected = model.logits([1, 2, first]).double().softmax(-1) * len(second)
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@settings(max_examples=80, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), st.data(), samplings, st.sampled_from([None, 1, 2, 5]))
def test_corpora_and_guess_length_change_cost_not_tokens(batch, data, sampling, block):
    """Look-ups in any texts, a guess worth trying up to any length, any number of rows in work."""
    ids = st.lists(st.integers(0, V - 1), max_size=12)
    for request in batch:
        request.coins = [True] * len(request.coins)
        request.guess_length = data.draw(st.integers(0, len(request.coins)))
        request.corpora = tuple(data.draw(st.lists(ids, max_size=2)))
    model = ToyModel(V)
    results, cost = sample_fixed_point(model, batch, sampling, block, data.draw(st.sampled_from([None, 1, 2])))
    assert [result.tokens for result in results] == [sequential(model, request, sampling) for request in batch]
    assert cost.final_coins >= sum(len(result.tokens) for result in results)
    assert cost.accepted_length == cost.final_coins / cost.row_passes
    assert cost.flips <= cost.redraws
    assert cost.misses <= cost.first_draws
    assert cost.first_draws + cost.redraws <= cost.draws


@settings(max_examples=60, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), samplings, st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_a_right_result_has_no_mismatches_and_a_corrupted_one_has(batch, sampling, block, where):
    model = ToyModel(V)
    results, cost = sample_fixed_point(model, batch, sampling, block)
    assert cost.draws == cost.first_draws + cost.redraws  # every coin had a guess
    checked = count_mismatches(model, batch, results, sampling)
    coins = [
        (result, t)
        for request, result in zip(batch, results, strict=True)
        for t, _ in enumerate(result.tokens)
        if request.coins[t]
    ]
    assert (checked.verified, checked.mismatches) == (len(coins), 0)
    if coins:
        result, t = coins[where % len(coins)]
        result.tokens[t] = (result.tokens[t] + 1) % V
        assert count_mismatches(model, batch, results, sampling).mismatches > 0

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ssgen_ds.sampler.filters import Sampling


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([0, 1, 4, 50]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_equals_hugging_face(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(Sampling(temperature=temperature, top_k=top_k, top_p=top_p).scores(logits), expected)


def test_banned_before_top_k():
    scores = Sampling(top_k=1, banned_ids=(2,)).scores(torch.tensor([[0.0, 1.0, 9.0]]))
    assert scores.tolist() == [[-torch.inf, 1.0, -torch.inf]]


def test_greedy_ignores_top_k_and_top_p():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert torch.equal(Sampling(temperature=0, top_k=1, top_p=0.1).scores(logits), logits)

"""The sampler's model interface over real architectures: rotary and learned positions, windows, soft-capping, MoE."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from transformers import AutoModelForCausalLM, GPTNeoConfig

from ssgen_ds.errors import UserError
from ssgen_ds.modeling import cache_check, pieces
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.draw import TIE
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import Request, sample_fixed_point
from ssgen_ds.sampler.noise import Stream, gumbel, sequence_key
from ssgen_ds.sampler.requests import CallLimit
from tests.support.tiny_models import tiny_model

GROUPED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Windows are shorter than the sequences below, so that they bite.
MODELS = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 9, "final_logit_softcapping": 5.0},
    "mixtral": {},
    "mixtral-window": {"sliding_window": 9},
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return tiny_model(request.param.split("-")[0], **MODELS[request.param])


def some_requests(coin_share: float) -> list[Request]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 96, (n,), generator=generator).tolist()

    def coins(n: int) -> list[bool]:
        return (torch.rand(n, generator=generator) < coin_share).tolist()

    return [Request(ids(p), ids(n), coins(n), key=p * 7 + n) for p, n in [(3, 20), (17, 9), (30, 25), (1, 4), (12, 31)]]


@torch.no_grad()
def assert_is_the_fixed_point(model, request: Request, tokens: list[int], sampling: Sampling) -> None:
    """Each sampled token is the argmax of its scores plus noise in ONE plain forward over the finished sequence.

    Only up to the tie rule: where the two best are within TIE, rounding decides.
    """
    start = len(request.prompt_ids)
    logits = model(torch.tensor([request.prompt_ids + tokens])).logits[0]
    for t, (token, coin) in enumerate(zip(tokens, request.coins, strict=False)):
        if not coin:
            assert token == request.guess_ids[t]
            continue
        scores = sampling.scores(logits[start + t - 1][None])
        scores = (scores + gumbel(torch.tensor([request.key]), torch.tensor([t]), scores.shape[-1]))[0]
        assert scores.max() - scores[token] < TIE


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("coin_share", [0.3, 1.0])
def test_samples_are_those_of_a_plain_forward(model, block, coin_share):
    """A batch of ragged rows with a cache against each row alone without one."""
    requests, sampling = some_requests(coin_share), Sampling(temperature=0.9, banned_ids=(0, 1, 2))
    results, _ = sample_fixed_point(CachedCausalLM(model), requests, sampling, block)
    for request, result in zip(requests, results, strict=True):
        assert_is_the_fixed_point(model, request, result.tokens, sampling)


def test_batching_and_block_do_not_change_tokens(model):
    requests, sampling = some_requests(0.5), Sampling()
    together, _ = sample_fixed_point(CachedCausalLM(model), requests, sampling, None)
    for request, expected in zip(requests, together, strict=True):
        (alone,), _ = sample_fixed_point(CachedCausalLM(model), [request], sampling, 1)
        assert expected.ties or alone.tokens == expected.tokens


def test_eager_attention_gives_the_same(model):
    requests = some_requests(0.5)
    before, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(), None)
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        after, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(), None)
    finally:
        model.set_attn_implementation(was)
    assert [result.tokens for result in after] == [result.tokens for result in before]


def test_cache_check_passes(model):
    check_cache(model)


def test_cache_check_refuses_a_family_with_a_mask_of_its_own():
    """GPT-Neo slices its causal mask by length and ignores where rows really are."""
    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], vocab_size=96,
        max_position_embeddings=64, window_size=8, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="gpt_neo"):
        check_cache(AutoModelForCausalLM.from_config(config).eval())


def test_samples_of_a_transformer_follow_its_softmax():
    """Chi-square of the second sampled token given the first, through the cache, over many keys."""
    model = tiny_model("llama", initializer_range=0.1)
    requests = [Request([5, 9, 40], [0, 0], [True, True], sequence_key(3, Stream.BSS, str(i), 0)) for i in range(4000)]
    results, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(top_k=6), None)
    first = torch.tensor([result.tokens[0] for result in results]).mode().values.item()
    second = torch.tensor([result.tokens[1] for result in results if result.tokens[0] == first])
    with torch.no_grad():
        scores = Sampling(top_k=6).scores(model(torch.tensor([[5, 9, 40, first]])).logits[0, -1:])[0]
    expected = scores.double().softmax(-1) * len(second)
    observed = torch.bincount(second, minlength=96)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible].numpy(), expected[possible].numpy()).pvalue > 1e-3


def test_left_padding_gives_the_same(model):
    """Users who pad on the left with explicit positions get the numbers of the right-padded batch."""
    request = some_requests(0.0)[2]
    row = torch.tensor([request.prompt_ids + request.guess_ids])
    pad, length = 6, row.shape[1]
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), row], dim=1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), torch.ones(1, length, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(row).logits
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, pad:]
    torch.testing.assert_close(left, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", [CallLimit(tokens=7), CallLimit(logits=2), CallLimit(tokens=16, logits=5)])
@pytest.mark.parametrize("chunk", [4, 256])
def test_a_call_within_limits_gives_the_same_tokens(model, limit, chunk, monkeypatch):
    """Prompts are read in chunks; long ones with a causal kernel, which here begins at 4 tokens."""
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    requests = some_requests(0.5)
    for block in (1, None):
        whole, stats_ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(), block)
        calls = []
        cached = CachedCausalLM(model, before_call=lambda calls=calls: calls.append(1))
        parts, _ = sample_fixed_point(cached, requests, Sampling(), block, limit=limit)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert len(calls) > stats_.calls


def test_where_flash_attn_is_asked_for_samples_are_the_same(model):
    """Its kernels know no mask over a memory; torch's own are taken for generation."""
    if model.config._attn_implementation != "sdpa":
        pytest.skip("Gemma 2 caps its attention scores, which neither can here")
    requests = some_requests(0.5)
    before, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(), 4)
    model.config._attn_implementation = "flash_attention_2"
    try:
        after, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(), 4)
    finally:
        model.config._attn_implementation = "sdpa"
    assert [result.tokens for result in after] == [result.tokens for result in before]


def test_keys_and_values_are_not_copied_to_all_heads(monkeypatch):
    """With a mask transformers repeats them in every layer: 32 GiB a call for 64 rows of 1024 tokens of an 8B model."""
    model = tiny_model("llama", num_hidden_layers=2)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > kv_heads
    real, seen = F.scaled_dot_product_attention, set()

    def sdpa(query, key, value, attn_mask=None, **kwargs):
        seen.add((key.shape[1], attn_mask is None))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    sample_fixed_point(CachedCausalLM(model), some_requests(0.5), Sampling(), 4)
    assert seen == {(kv_heads, True), (kv_heads, False)}, "prompts without a mask, rows with one"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_a_call_never_waits_for_the_device(family):
    """Tensors on the meta device have no values: whoever asks for one fails."""
    model = tiny_model(family).to("meta")
    cached = CachedCausalLM(model)
    cached.open(4, 64)
    fed = [Piece(0, 0, [5] * 9, [8]), Piece(1, 20, [5], [0]), Piece(2, 20, [5] * 40, [3, 39]), Piece(3, 20, [5], [])]
    assert cached(fed).shape == (4, model.config.vocab_size)
    cached.keep([1, 3])
    assert cached([Piece(0, 21, [5], [0]), Piece(1, 21, [5], [0])]).shape == (2, model.config.vocab_size)


def test_a_deep_model_in_low_precision_is_not_refused():
    """Its logits differ by more than a shallow one's, its distributions do not; a wrong mask changes both."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(24, 500, generator=generator)

    def moved(share: float) -> torch.Tensor:
        return expected + share * torch.randn(24, 500, generator=generator)

    half = torch.bfloat16
    assert cache_check._is_same(moved(0.1).to(half), expected.to(half))
    assert not cache_check._is_same(moved(0.1), expected)
    assert not cache_check._is_same(moved(0.4).to(half), expected.to(half))
    assert not cache_check._is_same(20 * moved(0.1).to(half), 20 * expected.to(half)), "sure of other tokens"

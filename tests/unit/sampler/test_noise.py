import torch
from scipy import stats

from ssgen_ds.sampler.noise import Stream, _as_int32, _mix, _mix_int32_, gumbel, sequence_key, uniform


def keys(n: int) -> torch.Tensor:
    return torch.tensor([sequence_key(0, Stream.BSS, f"example-{i}", 0) for i in range(n)])


def test_pinned_values():
    """These may never change: a resumed run must draw what the interrupted one would have drawn."""
    key = sequence_key(7, Stream.DRAFT, "abc", 2)
    assert key == -5411259033157257469
    noise = gumbel(torch.tensor([key]), torch.tensor([5]), 4)[0]
    assert torch.allclose(noise, torch.tensor(PINNED_NOISE), atol=1e-6)
    assert abs(uniform(torch.tensor([key]), torch.tensor([5])).item() - PINNED_UNIFORM) < 1e-12


PINNED_NOISE = [0.272638, 1.822444, 0.659983, 3.244188]
PINNED_UNIFORM = 0.5185542480321601


def test_every_part_of_the_key_matters():
    base = sequence_key(0, Stream.BSS, "a", 0)
    others = [
        sequence_key(1, Stream.BSS, "a", 0),
        sequence_key(0, Stream.DRAFT, "a", 0),
        sequence_key(0, Stream.BSS, "b", 0),
        sequence_key(0, Stream.BSS, "a", 1),
    ]
    assert len({base, *others}) == 5
    noise = gumbel(torch.tensor([base, base, others[0]]), torch.tensor([0, 1, 0]), 50)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    assert len(noise[0].unique()) == 50


def test_a_draw_does_not_depend_on_its_neighbours():
    all_keys, positions = keys(40), torch.arange(40) % 13
    together = gumbel(all_keys, positions, 300)
    for i in (0, 17, 39):
        assert torch.equal(gumbel(all_keys[i : i + 1], positions[i : i + 1], 300)[0], together[i])
    assert torch.equal(gumbel(all_keys, positions, 100), together[:, :100])


def test_uniforms_are_uniform_in_every_direction():
    """Kolmogorov-Smirnov over positions of one sequence, over sequences at one position, and serial correlation."""
    along = uniform(keys(1).expand(20_000), torch.arange(20_000)).numpy()
    across = uniform(keys(20_000), torch.zeros(20_000, dtype=torch.long)).numpy()
    for sample in (along, across):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
        assert abs(stats.pearsonr(sample[:-1], sample[1:])[0]) < 0.03


def test_noise_is_gumbel_and_resolves_the_upper_tail():
    noise = gumbel(keys(40), torch.arange(40), 50_000).flatten()
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise[::10].numpy(), "gumbel_r").pvalue > 1e-3
    # P(g > 12) = 6.1e-6: 12 of 2 million; float32 -log(-log u) would still reach this, but not beyond 15.9
    assert 2 <= int((noise > 12).sum()) <= 30


def test_int32_arithmetic_is_that_of_the_reference():
    """The in-place version on int32 gives the bits of the plain one on int64, on both sides of the sign bit."""
    words = torch.cat([torch.arange(2000), torch.arange(2**31 - 1000, 2**31 + 1000), torch.arange(2**32 - 2000, 2**32)])
    assert torch.equal(_mix_int32_(_as_int32(words)), _as_int32(_mix(words)))


def test_tokens_of_one_position_are_uncorrelated_with_those_of_the_next():
    noise = gumbel(keys(1).expand(2), torch.tensor([0, 1]), 50_000)
    assert abs(stats.spearmanr(noise[0].numpy(), noise[1].numpy())[0]) < 0.02

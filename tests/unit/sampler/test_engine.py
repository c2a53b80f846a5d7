"""The sampler on an engine, seen from one rank: order of the results, calls of the others, stops."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch

from ssgen_ds.errors import GenerationInterrupted, NonFiniteError
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.requests import Request
from ssgen_ds.sampler.strategy import Sharded
from tests.support.alone import Alone, alone
from tests.support.tiny_models import tiny_model


def sampler(world: Alone | None = None, rows: int = 2) -> EngineSampler:
    return EngineSampler(tiny_model("llama"), world or alone(), BatchLimit(rows))


def uneven() -> list[Request]:
    """The longest is neither first nor last."""
    return [free_request([5 + i, 6], length, key=i, stop_ids=frozenset()) for i, length in enumerate((3, 9, 1, 6))]


def test_results_come_in_the_order_of_the_requests():
    """They are dealt out and sampled longest first."""
    together, _, _ = sampler().sample(uneven(), Sampling(), None)
    assert [len(result.tokens) for result in together] == [3, 9, 1, 6]
    for request, result in zip(uneven(), together, strict=True):
        (apart,), _, _ = sampler().sample([request], Sampling(), 1)
        assert result.tokens == apart.tokens


@dataclass(frozen=True)
class OneOfTwo(Alone):
    """Rank 0; what rank 1 has made is known beforehand."""

    other: list = field(default_factory=list)

    def gather(self, item):
        return [item, *self.other]


def test_results_of_both_ranks_take_their_places():
    whole, _, _ = sampler().sample(uneven(), Sampling(), None)
    parts = []  # rank 1's own, as it would send it
    second = EngineSampler(tiny_model("llama"), alone(1, 2), BatchLimit(2))
    with second.ready():
        mine = [uneven()[i] for i in (3, 2)]  # the longest is rank 0's, then 6, 3 and 1 tokens
        parts.append(((second._sample_mine(mine, uneven(), Sampling(), None, lambda done, total: None)), None))
    assert [len(result.tokens) for result in parts[0][0][0]] == [6, 1]
    world = OneOfTwo(0, 0, 2, torch.device("cpu"), control=None, other=parts)
    found, cost, _ = EngineSampler(tiny_model("llama"), world, BatchLimit(2)).sample(uneven(), Sampling(), None)
    assert [result.tokens for result in found] == [result.tokens for result in whole]
    assert cost.response_tokens == 19


@pytest.mark.parametrize("when", ["before", "in mid-generation"])
def test_a_stop_ends_the_generation_at_the_next_pass(when):
    world = alone()
    one = sampler(world, rows=1)
    passes = []

    def look(*_) -> None:
        passes.append(1)
        world.stop.is_set = len(passes) == 2

    one.module.register_forward_hook(look)
    world.stop.is_set = when == "before"
    with pytest.raises(GenerationInterrupted):
        one.sample(uneven(), Sampling(), 1)
    assert len(passes) == (0 if when == "before" else 2)


@dataclass(frozen=True)
class AtWork(Alone):
    """Others make `calls` more calls after this rank has run out of work; then one may be asked to stop."""

    calls: list[bool] = field(default_factory=list)
    stops: bool = False

    def any_of(self, *flags: bool) -> list[bool]:
        has_work, stop = flags
        busy = self.calls.pop() if self.calls else False
        return [has_work or busy, stop or (self.stops and not busy)]


@dataclass
class CountedShards:
    parts: int = 0

    def take_part(self) -> None:
        self.parts += 1


def at_work(calls: int, stops: bool = False) -> tuple[Sharded, CountedShards]:
    world = AtWork(0, 0, 2, torch.device("cpu"), control=None, calls=[True] * calls, stops=stops)
    shards = CountedShards()
    return Sharded(shards, world), shards


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_rank_without_work_answers_every_call_of_the_others(calls):
    one, shards = at_work(calls)
    one.finish()
    assert shards.parts == calls


def test_a_stop_of_another_rank_ends_the_waiting_too():
    one, shards = at_work(2, stops=True)
    with pytest.raises(GenerationInterrupted):
        one.finish()
    assert shards.parts == 2


def test_whole_parameters_need_no_answers():
    world = AtWork(0, 0, 2, torch.device("cpu"), control=None, calls=[True] * 5)
    assert EngineSampler(tiny_model("llama"), world, BatchLimit(1)).share(lambda: "mine") == ["mine"]
    assert len(world.calls) == 5, "nobody was asked for a call"


def test_what_is_wrong_on_another_rank_is_raised_here():
    for problem in (NonFiniteError("generation on rank 1: NaN"), GenerationInterrupted()):
        world = OneOfTwo(0, 0, 2, torch.device("cpu"), control=None, other=[(None, problem)])
        one = EngineSampler(tiny_model("llama"), world, BatchLimit(2))
        with pytest.raises(type(problem)):
            one.sample(uneven(), Sampling(), None)


def test_the_model_trains_on_as_before_also_after_a_stop():
    one = sampler()
    one.module.train()
    one.sample(uneven(), Sampling(), None)
    assert one.module.training
    one.world.stop.is_set = True
    with pytest.raises(GenerationInterrupted):
        one.sample(uneven(), Sampling(), None)
    assert one.module.training
    one.world.stop.is_set = False
    with one.ready():
        assert not one.module.training and not torch.is_grad_enabled()


def test_what_is_freed_goes_back_to_the_gpu_between_generation_and_training(monkeypatch):
    """Once when it begins and once when it ends, also after an error; not between the batches of a round."""
    order = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("given back"))
    on_gpu = EngineSampler(tiny_model("llama"), alone(), BatchLimit(2))
    object.__setattr__(on_gpu.world, "device", torch.device("cuda", 0))
    with suppress(NonFiniteError), on_gpu.ready():
        with on_gpu.ready():
            order.append("batch")
        raise NonFiniteError("on purpose")
    assert order == ["given back", "batch", "given back"]
    with sampler().ready():
        pass
    assert len(order) == 3, "a CPU has nothing to give back"

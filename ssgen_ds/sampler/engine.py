"""The sampler on a (possibly sharded) model on many ranks: deal requests out, sample, put results together.

Ranks need different numbers of model calls. Where a call is a collective, the strategy keeps ranks that have run out of
work taking part: see `strategy.py`.

A stop that was requested of any rank ends the generation. Where calls are collectives, the ranks agree on it before the
same call and leave together. Otherwise each rank leaves before its next call, the watchdog spreads the request within a
second, and the ranks agree when they put their results together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch

from ssgen_ds.distributed.world import World
from ssgen_ds.errors import GenerationInterrupted, NonFiniteError
from ssgen_ds.modeling.cached import CachedCausalLM, inference_mode
from ssgen_ds.modeling.decode_step import Record
from ssgen_ds.modeling.recorded import Recording
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import count_mismatches, sample_fixed_point
from ssgen_ds.sampler.limits import rows_that_fit
from ssgen_ds.sampler.requests import CallLimit, OnDone, Request, Sampled, SamplerStats
from ssgen_ds.sampler.strategy import Local, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")
_NO_LIMIT = CallLimit()
_VERIFIED = 8  # requests drawn once more in lower precision


@dataclass(frozen=True)
class BatchLimit:
    """How many sequences are in work at a time on one rank."""

    rows: int
    cache_bytes: float = float("inf")  # for keys and values
    bytes_per_token: int = 0  # of keys and values, over all layers
    call: CallLimit = _NO_LIMIT  # what one call may take, whatever the rows

    def rows_for(self, requests: list[Request]) -> int:
        """Rows whose caches fit, each as long as the longest request; at least one."""
        longest = max((len(request.prompt_ids) + len(request.coins) for request in requests), default=0)
        return self.rows_of(longest)

    def rows_of(self, length: int) -> int:
        """Rows of so many tokens each; at least one."""
        return rows_that_fit(self.cache_bytes, length * self.bytes_per_token, self.rows)


class Recorder(Protocol):
    """Wants what the model computes for the requests, on the rank that it names for each."""

    def deal(self, requests: list[Request]) -> list[list[int]]:
        """Indices of each rank's requests."""

    def recording(self, mine: list[Request]) -> AbstractContextManager[Recording]: ...


def deal(requests: list[Request], rank: int, world_size: int) -> list[int]:
    """Indices of a rank's requests, longest first, so that the ranks finish together and the last rows are short."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - len(requests[i].coins))
    return order[rank::world_size]


@dataclass
class EngineSampler:
    """Samples requests that every rank passes in the same order; every rank gets all the results.

    Args:
        module: the causal LM, `engine.module` while training.
        world: the ranks.
        limit: how many sequences are in work at a time.
        strategy: how the parameters are held.
        record: records calls of one token a row, to replay them; None makes every call anew.
    """

    module: PreTrainedModel
    world: World
    limit: BatchLimit
    strategy: Strategy = field(default_factory=Local)
    record: Record | None = None
    _is_ready: bool = field(default=False, init=False)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, and the parameters as the strategy wants them; all ranks enter and leave together.

        `sample` enters by itself. A caller that samples several times in a row enters first, so that parameters are
        gathered once.
        """
        if self._is_ready:
            yield
            return
        self._give_back()
        try:
            with torch.no_grad(), inference_mode(self.module), self.strategy.parameters():
                self._is_ready = True
                yield
        finally:
            self._is_ready = False
            self._give_back()

    def _give_back(self) -> None:
        """What training or generation has freed, to the GPU: the other wants blocks of other sizes."""
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def before_call(self) -> None:
        """What `share` runs before each of its model calls. Raises GenerationInterrupted."""
        self.world.phases.tick("pass")
        if self.world.stop.is_set and not self.strategy.is_collective:
            raise GenerationInterrupted
        self.strategy.before_call()

    def model(self) -> CachedCausalLM:
        """The module as the sampler's model; only while `ready`."""
        assert self._is_ready, "the sampler is not ready"
        return CachedCausalLM(self.module, self.strategy.before_call, self.world.device, self.record)

    def sample(
        self,
        requests: list[Request],
        sampling: Sampling,
        block: int | None,
        on_done: OnDone = lambda done, total: None,
        recorder: Recorder | None = None,
    ) -> tuple[list[Sampled], SamplerStats, float]:
        """Results in the order of the requests, costs summed over the ranks, and the seconds it took.

        In lower precision than float32 some requests are drawn once more at the end, and what differs is counted.
        Raises on all ranks GenerationInterrupted when one of them was asked to stop, NonFiniteError when the logits of
        one are NaN or infinite.
        """
        start = time.perf_counter()
        world = self.world
        shares = [deal(requests, rank, world.size) for rank in range(world.size)]
        if recorder is not None:
            shares = recorder.deal(requests)
        mine = [requests[i] for i in shares[world.rank]]
        on_done = _on_done_of_all(on_done, world.size, len(requests))
        results_by_index: dict[int, Sampled] = {}
        total = SamplerStats()
        parts = self.share(lambda: self._sample_mine(mine, requests, sampling, block, on_done, recorder))
        for share, (results, cost) in zip(shares, parts, strict=True):
            results_by_index.update(zip(share, results, strict=True))
            total.add(cost)
        return [results_by_index[i] for i in range(len(requests))], total, time.perf_counter() - start

    def share(self, work: Callable[[], T]) -> list[T]:
        """Each rank does its part of some work; every rank gets what all of them made, in rank order.

        A part makes any number of model calls, each after a `before_call`. Raises on all ranks what `sample` does.
        """
        result: T | None = None
        problem: Exception | None = None
        with self.ready():
            try:
                result = work()
            except GenerationInterrupted as stopped:
                if self.strategy.is_collective:
                    raise  # all ranks have left before the same call
                problem = stopped
            except NonFiniteError as error:  # the others may not know yet: they are told below
                problem = NonFiniteError(
                    f"generation on rank {self.world.rank}: {error}; the weights overflow or hold NaN"
                )
            self.strategy.finish()
        parts = self.world.gather((result, problem))
        for _, problem in parts:
            if problem is not None:
                raise problem
        return [cast(T, result) for result, _ in parts]

    def _sample_mine(
        self,
        mine: list[Request],
        everyones: list[Request],
        sampling: Sampling,
        block: int | None,
        on_done: OnDone,
        recorder: Recorder | None = None,
    ) -> tuple[list[Sampled], SamplerStats]:
        rows = self.limit.rows_for(everyones)
        with nullcontext() if recorder is None else recorder.recording(mine) as recording:
            model = CachedCausalLM(self.module, self.before_call, self.world.device, self.record, recording)
            results, stats = sample_fixed_point(model, mine, sampling, block, rows, on_done, self.limit.call)
        model.recording = None
        if self.module.dtype != torch.float32:
            some = slice(0, min(rows, _VERIFIED))
            stats.add(count_mismatches(model, mine[some], results[some], sampling, self.limit.call))
        return results, stats


def _on_done_of_all(on_done: OnDone, ranks: int, total: int) -> OnDone:
    """The ranks have shares of one size: what this one has done, the others are taken to have done too."""
    return lambda done, _: on_done(min(done * ranks, total), total)

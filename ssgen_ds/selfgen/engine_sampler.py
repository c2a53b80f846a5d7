"""The sampler on a (possibly sharded) model on many ranks: deal requests out, sample, put results together.

With `sharded` parameters every forward is a collective, and ranks need different numbers of them. A rank announces each
call before it makes it; one that has run out of work keeps taking part until nobody announces any more. So the number
of forwards is the same everywhere, whatever the passes, the stop ids or the batches are.

A stop that was requested of any rank ends the generation: with `sharded` parameters the announcement carries it, and
all leave before the same call; otherwise each rank leaves before its next one, the watchdog spreads the request within
a second, and the ranks agree when they put their results together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ssgen_ds.distributed import World
from ssgen_ds.errors import GenerationInterrupted, NonFiniteError
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.shards import Shards
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.fixed_point import count_mismatches, sample_fixed_point
from ssgen_ds.selfgen.requests import Request, Sampled, SamplerStats

T = TypeVar("T")
Progress = Callable[[int, int], None]
_VERIFIED = 8  # requests drawn once more in lower precision: all their logits are in memory at once
SHARDED, GATHERED, LOCAL, DEQUANTIZED = "sharded", "gathered", "local", "dequantized"


@dataclass(frozen=True)
class BatchLimit:
    """How many sequences are in work at a time on one rank."""

    rows: int
    cache_bytes: float = float("inf")  # for keys and values
    bytes_per_token: int = 0  # of keys and values, over all layers

    def rows_for(self, requests: list[Request]) -> int:
        """Rows whose caches fit, each as long as the longest request; at least one."""
        longest = max((len(request.prompt_ids) + len(request.coins) for request in requests), default=0)
        return self.rows_of(longest)

    def rows_of(self, length: int) -> int:
        """Rows of so many tokens each; at least one."""
        needed = max(1, length * self.bytes_per_token)
        return int(max(1, min(self.rows, self.cache_bytes // needed)))


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
        strategy: `local` (every rank has whole parameters), of a quantised base also `dequantized` (once a round),
            or under ZeRO-3 `sharded` or `gathered`.
        shards: the partitioned parameters; needed unless the strategy is `local`.
        limit: of the sequences in work at a time.
    """

    module: torch.nn.Module
    world: World
    limit: BatchLimit
    strategy: str = LOCAL
    shards: Shards | None = None
    _before_call: Callable[[], object] | None = field(default=None, init=False)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, and the parameters as the strategy wants them; all ranks enter and leave together.

        `sample` enters by itself; who samples several times in a row enters first, so that parameters are gathered
        once.
        """
        if self._before_call is not None:
            yield
            return
        with torch.no_grad(), inference_mode(self.module), self._parameters() as before_call:
            self._before_call = before_call
            try:
                yield
            finally:
                self._before_call = None

    @contextmanager
    def _parameters(self) -> Iterator[Callable[[], object]]:
        """Yields what must run before each forward."""
        if self.strategy == LOCAL:
            yield lambda: None
        elif self.strategy == DEQUANTIZED:
            from ssgen_ds.modeling.nf4 import dequantized

            with dequantized(self.module):
                yield lambda: None
        elif self.strategy == GATHERED:
            with self.shards.gathered():
                yield lambda: None
        else:
            with self.shards.sharded():
                yield self._announce

    def _announce(self, has_work: bool = True) -> bool:
        """Whether any rank makes one more call; GenerationInterrupted on all ranks when one was asked to stop."""
        somebody_calls, stop = self.world.any_of(has_work, self.world.stop.is_set)
        if stop:
            raise GenerationInterrupted
        return somebody_calls

    def before_call(self) -> None:
        """What `share` runs before each of its model calls. Raises GenerationInterrupted."""
        self.world.phases.tick("pass")
        if self.strategy != SHARDED and self.world.stop.is_set:
            raise GenerationInterrupted
        self._before_call()

    def model(self) -> CachedCausalLM:
        """The module as the sampler's model; only while `ready`."""
        return CachedCausalLM(self.module, self._before_call)

    def sample(
        self, requests: list[Request], sampling: Sampling, block: int | None, progress: Progress = lambda done, n: None
    ) -> tuple[list[Sampled], SamplerStats, float]:
        """Results in the order of the requests, costs summed over the ranks, and the seconds it took.

        In lower precision than float32 some requests are drawn once more at the end, and what differs is counted.
        Raises on all ranks GenerationInterrupted when one of them was asked to stop, NonFiniteError when the logits of
        one are NaN or infinite.
        """
        start = time.perf_counter()
        world = self.world
        mine = [requests[i] for i in deal(requests, world.rank, world.size)]
        on_done = _progress_of_all(progress, world.size, len(requests))
        results_by_index: dict[int, Sampled] = {}
        total = SamplerStats()
        parts = self.share(lambda: self._sample_mine(mine, requests, sampling, block, on_done))
        for rank, (results, cost) in enumerate(parts):
            results_by_index.update(zip(deal(requests, rank, world.size), results, strict=True))
            total.add(cost)
        return [results_by_index[i] for i in range(len(requests))], total, time.perf_counter() - start

    def share(self, work: Callable[[], T]) -> list[T]:
        """Each rank does its part of some work; every rank gets what all of them made, in rank order.

        A part makes any number of model calls, each after a `before_call`. Raises on all ranks what `sample` does.
        """
        result, problem = None, None
        with self.ready():
            try:
                result = work()
            except GenerationInterrupted as stopped:
                if self.strategy == SHARDED:
                    raise  # all ranks have left before the same call
                problem = stopped
            except NonFiniteError as error:  # the others may not know yet: they are told below
                problem = NonFiniteError(
                    f"generation on rank {self.world.rank}: {error}; the weights overflow or hold NaN"
                )
            self.finish()
        parts = self.world.gather((result, problem))
        for _, problem in parts:
            if problem is not None:
                raise problem
        return [result for result, _ in parts]

    def _sample_mine(
        self,
        mine: list[Request],
        everyones: list[Request],
        sampling: Sampling,
        block: int | None,
        on_done: Callable[[int], None],
    ) -> tuple[list[Sampled], SamplerStats]:
        model = CachedCausalLM(self.module, self.before_call)
        rows, device = self.limit.rows_for(everyones), self.world.device
        results, stats = sample_fixed_point(model, mine, sampling, block, device, rows, on_done)
        if self.module.dtype != torch.float32:
            some = slice(0, min(rows, _VERIFIED))
            stats.add(count_mismatches(model, mine[some], results[some], sampling, device))
        return results, stats

    def finish(self) -> None:
        """Answer the calls of the ranks that are still at work. All ranks call it when their own work is done."""
        if self.strategy == SHARDED:
            while self._announce(has_work=False):
                self.shards.take_part()


def _progress_of_all(progress: Progress, ranks: int, total: int) -> Callable[[int], None]:
    """What one rank has done stands for what each has."""
    return lambda done: progress(min(done * ranks, total), total)


@contextmanager
def inference_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) inside, what it was before outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)

"""The sampler on a (possibly sharded) model on many ranks: deal requests out, sample, put results together.

Under ZeRO-3 every forward is a collective, and ranks need different numbers of them. A rank announces each call before
it makes it; one that has run out of work keeps answering with a dummy forward until nobody announces any more. So the
number of forwards is the same everywhere, whatever the passes, the stop ids or the batches are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ssgen_ds.distributed import World
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.fixed_point import Request, Sampled, SamplerStats, sample_fixed_point

Progress = Callable[[int, int], None]


@dataclass
class EngineSampler:
    """Samples requests that every rank passes in the same order; every rank gets all the results.

    Args:
        module: the causal LM, `engine.module` while training.
        world: the ranks.
        sharded: whether a forward is a collective (ZeRO-3).
        batch: sequences sampled together on one rank.
    """

    module: torch.nn.Module
    world: World
    sharded: bool
    batch: int

    def sample(
        self, requests: list[Request], sampling: Sampling, block: int | None, progress: Progress = lambda done, n: None
    ) -> tuple[list[Sampled], SamplerStats, float]:
        """Results in the order of the requests, costs summed over the ranks, and the seconds it took."""
        start = time.perf_counter()
        batches = _batches(requests, self.batch)
        mine: dict[int, Sampled] = {}
        stats = SamplerStats()
        with torch.no_grad(), inference_mode(self.module), self._lockstep() as before_call:
            model = CachedCausalLM(self.module, before_call)
            for number, indices in enumerate(batches):
                if number % self.world.size == self.world.rank:
                    results, cost = sample_fixed_point(
                        model, [requests[i] for i in indices], sampling, block, self.world.device
                    )
                    mine.update(zip(indices, results, strict=True))
                    stats.add(cost)
                progress(sum(map(len, batches[: number + 1])), len(requests))
        results_by_index: dict[int, Sampled] = {}
        total = SamplerStats()
        for results, cost in self.world.gather((mine, stats)):
            results_by_index.update(results)
            total.add(cost)
        return [results_by_index[i] for i in range(len(requests))], total, time.perf_counter() - start

    @contextmanager
    def _lockstep(self) -> Iterator[Callable[[], object]]:
        """Yields what must run before each forward; on leaving, answers the calls of the ranks still at work."""
        if not self.sharded or self.world.size == 1:
            yield lambda: None
            return
        yield lambda: self.world.any(True)
        while self.world.any(False):
            token = torch.zeros(1, 1, dtype=torch.long, device=self.world.device)
            self.module(input_ids=token, use_cache=False)


def _batches(requests: list[Request], size: int) -> list[list[int]]:
    """Indices of requests in batches of similar length, longest first: the ranks finish together."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - len(requests[i].coins))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


@contextmanager
def inference_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) inside, what it was before outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)

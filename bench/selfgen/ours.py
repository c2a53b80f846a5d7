"""The product's sampler as the benchmark uses it. The only file that knows its interface."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from bench.selfgen.baselines import token_by_token
from bench.selfgen.work import Work
from ssgen_ds.data.tokenize import Example
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.shards import Shards
from ssgen_ds.sampler.block import block_name, choose_block, choose_draft_block
from ssgen_ds.sampler.call_cost import CallCost, measure_call_cost
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.requests import Request, Sampled, SamplerStats
from ssgen_ds.sampler.strategy import Gathered, Local, Sharded, Strategy

StrategyName = Literal["local", "sharded", "gathered"]
Outcome = tuple[list[Sampled], SamplerStats]


class Ours:
    """Samples on one model by any strategy; the cost of a call is measured once for each, as in a run.

    Args:
        work: for the vocabulary and what may be sampled.
        world: the ranks.
        module: the model, partitioned if there is an engine.
        engine: DeepSpeed's ZeRO-3 engine, unless the strategy is always `local`.
    """

    def __init__(self, work: Work, world: World, module: torch.nn.Module, engine: Any = None):
        self._work, self._world, self._module = work, world, module
        self._shards = None if engine is None else Shards(module, engine.optimizer.parameter_offload)
        self._costs: dict[tuple[StrategyName, int], CallCost] = {}

    def contexts(self, strategy: StrategyName, requests: list[Request], block: int | None) -> Outcome:
        """Mixed contexts in one batch a rank; results in the order of the requests, all ranks' costs added up."""
        sampler = self._sampler(strategy, len(requests))
        results, stats, _ = sampler.sample(requests, self._work.context_sampling(), block)
        return results, stats

    def context_block(self, strategy: StrategyName, requests: list[Request]) -> tuple[int | None, dict[str, Any]]:
        """The W that `block: auto` chooses for these contexts, and why."""
        cost, limit = self._cost(strategy, requests), self._sampler(strategy, len(requests)).limit
        block, seconds = self._world.broadcast(choose_block(cost, requests, limit, self._world.size))
        return block, {"block": block_name(block), "predicted_seconds": seconds, "call_cost": asdict(cost)}

    def token_by_token(self, strategy: StrategyName, requests: list[Request]) -> list[list[int]]:
        """Baseline (a) for this rank's requests; every rank has requests of the same length."""
        sampler = self._sampler(strategy, len(requests))
        with sampler.ready():
            contexts, _, _ = token_by_token(sampler.model(), requests, self._work.context_sampling())
            sampler.strategy.finish()
        return contexts

    def draft_block(self, strategy: StrategyName, examples: list[Example], rows: int, max_new_tokens: int) -> int:
        """The W that `block: auto` chooses for drafts, `rows` at a time on a rank."""
        requests = [
            free_request(one.prompt_ids, max_new_tokens, 0, frozenset()) for one in examples[: rows * self._world.size]
        ]
        return self._world.broadcast(choose_draft_block(self._cost(strategy, requests), rows))

    def drafts(
        self, strategy: StrategyName, examples: list[Example], rows: int, max_new_tokens: int, block: int, visit: int
    ) -> Outcome:
        """Free decoding as a round does it: guesses are looked up in the prompt and in the reference."""
        stop_ids = frozenset(self._work.stop_ids)
        requests = [
            free_request(
                example.prompt_ids,
                max_new_tokens,
                self._work.draft_key(example, visit),
                stop_ids,
                corpora=(example.response_ids,),
            )
            for example in examples
        ]
        sampler = self._sampler(strategy, rows * self._world.size)
        results, stats, _ = sampler.sample(requests, Sampling(), block)
        return results, stats

    def _sampler(self, strategy: StrategyName, count: int) -> EngineSampler:
        limit = BatchLimit(rows=-(-count // self._world.size))
        return EngineSampler(self._module, self._world, limit, self._strategy(strategy))

    def _strategy(self, name: StrategyName) -> Strategy:
        if name == "local":
            return Local()
        assert self._shards is not None, "the strategy needs the partitioned parameters"
        return Gathered(self._shards) if name == "gathered" else Sharded(self._shards, self._world)

    def _cost(self, strategy: StrategyName, requests: list[Request]) -> CallCost:
        count = len(requests)
        if (strategy, count) not in self._costs:
            sampler = self._sampler(strategy, count)
            with sampler.ready():
                self._costs[strategy, count] = measure_call_cost(sampler, self._work.vocab_size, requests)
                sampler.strategy.finish()
        return self._costs[strategy, count]

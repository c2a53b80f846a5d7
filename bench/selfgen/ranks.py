"""S4 and S5: two ranks, parameters partitioned by ZeRO-3."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from bench.selfgen.baselines import token_by_token
from bench.selfgen.measure import Side, interleave, peak_memory
from bench.selfgen.ours import Ours, Strategy
from bench.selfgen.peers import HybridRollout, Trl, left_padded
from bench.selfgen.rows import Row, times_better
from bench.selfgen.single import different_rows
from bench.selfgen.sizes import MIX_RATES
from bench.selfgen.work import SEED, Work
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.cached import CachedCausalLM, inference_mode
from ssgen_ds.modeling.gather import full_shape
from ssgen_ds.modeling.load import load_model
from ssgen_ds.recipe.deepspeed import build_ds_config
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import AdapterConfig
from ssgen_ds.sampler.requests import Request

HOOKS, OWN = "token by token, DeepSpeed's hooks", "token by token, our sharded strategy"
COIN_TO_COIN = "coin to coin"
DRAFT_BARS = {"gathered": 1.5, "sharded": 3.0}
SPEED_BARS = {0.1: 12.0, 0.25: 5.0}
SMALLEST_MODEL_MIB = 64.0  # below, a process's memory says nothing about a model


@dataclass(frozen=True)
class RankBench:
    """One ZeRO-3 engine, shared by all sides."""

    work: Work
    world: World
    engine: Any
    ds_config: dict[str, Any]
    ours: Ours

    def token_by_token(self, requests: list[Request], own_strategy: bool) -> list[list[int]]:
        """Baseline (a) on this rank's share of the requests, through DeepSpeed's hooks or by our strategy."""
        mine = requests[self.world.rank :: self.world.size]
        if own_strategy:
            return self.ours.token_by_token("sharded", mine)
        model = CachedCausalLM(self.engine.module)
        with inference_mode(self.engine.module):
            return token_by_token(model, mine, self.work.context_sampling())[0]


def build_rank_bench(work: Work, world: World) -> RankBench:
    """The engine that the product itself would build for full finetuning."""
    recipe = parse_recipe(
        {
            "model": work.model.model_dump(),
            "data": {"train": "unused"},
            "train": {"max_steps": 1, "global_batch": world.size, "micro_batch": 1},
            "deepspeed": "ds_configs/zero3.json",
            "output_dir": "unused",
        }
    )
    import deepspeed

    ds_config = build_ds_config(recipe, world.size, "float32")
    model = load_model(work.model, AdapterConfig(), ds_config, device=world.device)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return RankBench(work, world, engine, ds_config, Ours(work, world, model, engine))


def sharded_contexts(bench: RankBench) -> Row:
    """S4: seconds for the contexts of all ranks while parameters stay partitioned.

    Token by token takes T calls of one token a row at every mix_rate, so it is timed at the first one; only its few
    draws depend on the rate, and more are made at the higher.
    """
    sizes, world = bench.work.sizes, bench.world
    model_mib = sum(full_shape(p).numel() * p.element_size() for p in bench.engine.module.parameters()) / 2**20
    mine, peer, checks = {}, {}, {}
    details: dict[str, Any] = {"model_mib": model_mib}
    token_sides: dict[str, Side] = {}
    for mix_rate in MIX_RATES:
        case = f"{mix_rate}"
        requests = bench.work.contexts(mix_rate, sizes.rows_per_rank * world.size)
        block, why = bench.ours.context_block("sharded", requests)
        with peak_memory() as peak:
            bench.ours.contexts("sharded", requests, block)
        sides = {
            "auto": Side(partial(bench.ours.contexts, "sharded", requests, block), sizes.repeats),
            COIN_TO_COIN: Side(partial(bench.ours.contexts, "sharded", requests, 1), sizes.repeats),
        }
        if not token_sides:
            token_sides = {
                HOOKS: Side(partial(bench.token_by_token, requests, own_strategy=False), sizes.slow_repeats),
                OWN: Side(partial(bench.token_by_token, requests, own_strategy=True), sizes.slow_repeats),
            }
            sides |= token_sides
        interleave(sides, world)
        results, stats = sides["auto"].results[0]
        by_coin, coin_stats = sides[COIN_TO_COIN].results[0]
        wrong = different_rows(results, [one.tokens for one in by_coin])
        if HOOKS in sides:
            share = results[world.rank :: world.size]
            wrong += int(world.sum(sum(different_rows(share, sides[name].results[0]) for name in token_sides))[0])
        mine[case] = sides["auto"].median
        peer[case] = {name: side.median for name, side in (sides | token_sides).items() if name != "auto"}
        rise = None if peak["mib"] is None else world.max(peak["mib"])
        checks |= _check_contexts(case, mine[case], peer[case], SPEED_BARS[mix_rate], wrong)
        if rise is not None and model_mib > SMALLEST_MODEL_MIB:
            checks[f"memory rises by less than the model at {case}"] = rise < model_mib
        details[case] = {
            **why,
            "calls_all_ranks": stats.calls,
            "coin_calls_all_ranks": coin_stats.calls,
            "memory_rise_mib": rise,
            "different_rows": wrong,
            "seconds": {name: side.seconds for name, side in (sides | token_sides).items()},
        }
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), checks, details)


def _check_contexts(case: str, mine: float, peer: dict[str, float], bar: float, wrong: int) -> dict[str, bool]:
    """What the bar of S4 asks for at one mix_rate, memory apart."""
    return {
        f"tokens identical at {case}": wrong == 0,
        f"at least {bar:g}x token by token at {case}": peer[HOOKS] >= bar * mine,
        f"not below coin to coin at {case}": peer[COIN_TO_COIN] >= mine,
    }


def drafts(bench: RankBench) -> Row:
    """S5: useful tokens per second of free drafts, all ranks together; ranks meet stop ids at different steps."""
    sizes, work, world = bench.work.sizes, bench.work, bench.world
    count = sizes.drafts_per_rank * world.size
    examples = work.examples[:count]
    # Peers know nothing but batches: each is as wide as its longest prompt and runs until its last row has stopped.
    share = sorted((example.prompt_ids for example in examples[world.rank :: world.size]), key=len)
    batches = [
        left_padded(
            share[begin : begin + sizes.draft_rows],
            sizes.max_new_tokens,
            work.stop_ids,
            work.tokenizer.pad_token_id,
            world.device,
        )
        for begin in range(0, len(share), sizes.draft_rows)
    ]
    visits = iter(range(2**31))  # another draw at every repeat, the same number on all ranks
    names: tuple[Literal["gathered", "sharded"], ...] = ("gathered", "sharded")
    blocks = {name: bench.ours.draft_block(name, examples, sizes.draft_rows, sizes.max_new_tokens) for name in names}

    def own(strategy: Strategy) -> int:
        """Useful tokens of this rank's share."""
        results, _ = bench.ours.drafts(
            strategy, examples, sizes.draft_rows, sizes.max_new_tokens, blocks[strategy], next(visits)
        )
        return sum(len(result.tokens) for result in results[world.rank :: world.size])

    def seed() -> int:
        return SEED + world.size * next(visits) + world.rank

    trl, hybrid = Trl(bench.engine, bench.ds_config), HybridRollout(bench.engine, work.tokenizer)
    groups = {
        "gathered": {
            "ours": Side(partial(own, "gathered"), sizes.repeats),
            "TRL": Side(lambda: trl.generate(batches, seed(), gather=True), sizes.repeats),
        },
        "sharded": {
            "ours": Side(partial(own, "sharded"), sizes.repeats),
            "TRL": Side(lambda: trl.generate(batches, seed(), gather=False), sizes.slow_repeats),
            "HybridEngineRollout": Side(lambda: hybrid.generate(batches, seed()), sizes.slow_repeats),
        },
    }
    mine, peer, checks, details = {}, {}, {}, {}
    for case, bar in DRAFT_BARS.items():
        sides = groups[case]
        interleave(sides, world)
        speeds = {name: _speeds(side, world) for name, side in sides.items()}
        mine[case] = statistics.median(speeds["ours"])
        peer[case] = {name: statistics.median(values) for name, values in speeds.items() if name != "ours"}
        checks[f"at least {bar:g}x {case}"] = mine[case] >= bar * max(peer[case].values())
        details[case] = {
            "block": blocks[case],
            "seconds": {name: side.seconds for name, side in sides.items()},
            "tokens_of_ranks": {
                name: list(zip(*world.gather(side.results), strict=True)) for name, side in sides.items()
            },
        }
    checks["ended although ranks stop at different steps"] = True
    return Row(mine, peer, times_better(mine, peer, higher_is_better=True), checks, details)


def _speeds(side: Side, world: World) -> list[float]:
    """Tokens per second of each repeat, all ranks together."""
    return [world.sum(tokens)[0] / seconds for tokens, seconds in zip(side.results, side.seconds, strict=True)]


ROWS = {"S4": sharded_contexts, "S5": drafts}

"""S1, S2, S3 and S6: one process."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.selfgen.measure import Side, interleave
from bench.selfgen.ours import Ours, Outcome
from bench.selfgen.rows import Row, times_better
from bench.selfgen.sizes import MIX_RATES
from bench.selfgen.work import Work
from ssgen_ds.distributed.world import World
from ssgen_ds.modeling.load import load_model
from ssgen_ds.recipe.schema import AdapterConfig
from ssgen_ds.sampler.requests import Request, Sampled

CALL_BARS = {0.1: 6, 0.25: 12}
FORWARD_BARS = {0.1: 2.0, 0.25: 3.5}


@dataclass(frozen=True)
class SingleBench:
    """A plain model in one process."""

    work: Work
    world: World
    module: torch.nn.Module
    ours: Ours

    def sample(self, requests: list[Request], block: int | None) -> Outcome:
        """One batch of contexts by our sampler."""
        return self.ours.contexts("local", requests, block)

    def token_by_token(self, requests: list[Request]) -> list[list[int]]:
        return self.ours.token_by_token("local", requests)

    def auto_block(self, mix_rate: float) -> tuple[int | None, dict[str, Any]]:
        return self.ours.context_block("local", next(self.batches(mix_rate)))

    def batches(self, mix_rate: float) -> Iterator[list[Request]]:
        size = self.work.sizes.rows
        requests = self.work.contexts(mix_rate, len(self.work.examples))
        return (requests[begin : begin + size] for begin in range(0, len(requests) - size + 1, size))


def build_single_bench(work: Work, world: World) -> SingleBench:
    """Load the model whole."""
    module = load_model(work.model, AdapterConfig(), {}, device=world.device)
    return SingleBench(work, world, module, Ours(work, world, module))


def different_rows(results: Sequence[Sampled], expected: Sequence[list[int]]) -> int:
    """Rows whose tokens differ though no draw was so close that rounding may have decided it."""
    pairs = zip(results, expected, strict=True)
    return sum(result.tokens != tokens and result.ties == 0 for result, tokens in pairs)


def calls(bench: SingleBench) -> Row:
    """S1: calls of whole-response passes against (a) and (b), and whether all three sample the same tokens."""
    mine, peer, checks, details = {}, {}, {}, {}
    for mix_rate in MIX_RATES:
        case = f"{mix_rate}"
        whole, coins, wrong, ties = [], [], 0, 0
        for requests in bench.batches(mix_rate):
            results, stats = bench.sample(requests, None)
            by_coin, coin_stats = bench.sample(requests, 1)
            wrong += different_rows(results, bench.token_by_token(requests))
            wrong += different_rows(results, [one.tokens for one in by_coin])
            whole.append(stats.calls)
            coins.append(coin_stats.calls)
            ties += stats.ties
        mine[case] = max(whole)
        peer[case] = {"token by token": bench.work.sizes.num_tokens, "coin to coin": max(coins)}
        checks[f"at most {CALL_BARS[mix_rate]} calls at {case}"] = max(whole) <= CALL_BARS[mix_rate]
        checks[f"at most half the calls of coin to coin at {case}"] = 2 * max(whole) <= max(coins)
        checks[f"tokens identical at {case}"] = wrong == 0
        details[case] = {"calls_by_batch": whole, "coin_calls_by_batch": coins, "different_rows": wrong, "ties": ties}
    details["passes"] = passes_by_rate_and_length(bench)
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), checks, details)


def passes_by_rate_and_length(bench: SingleBench) -> list[dict[str, float]]:
    """Points of the plot: passes a row at W = all against mix_rate and T."""
    sizes, points = bench.work.sizes, []
    for num_tokens in sizes.plot_num_tokens:
        for mix_rate in sizes.plot_mix_rates:
            requests = bench.work.contexts(mix_rate, sizes.rows, num_tokens)
            results, _ = bench.sample(requests, None)
            points.append(
                {
                    "mix_rate": mix_rate,
                    "num_tokens": num_tokens,
                    "passes": statistics.mean(result.passes for result in results),
                    "passes_max": max(result.passes for result in results),
                    "coins": statistics.mean(sum(request.coins) for request in requests),
                }
            )
    return points


def token_forwards(bench: SingleBench) -> Row:
    """S2: arithmetic at the chosen W, prompts apart; sequential sampling needs 1.0."""
    mine, peer, checks, details = {}, {}, {}, {}
    for mix_rate in MIX_RATES:
        case = f"{mix_rate}"
        block, why = bench.auto_block(mix_rate)
        forwards = tokens = 0
        for requests in bench.batches(mix_rate):
            _, stats = bench.sample(requests, block)
            forwards += stats.token_forwards - sum(len(r.prompt_ids) for r in requests if any(r.coins))
            tokens += stats.response_tokens
        mine[case] = forwards / tokens
        peer[case] = {"token by token": 1.0}
        checks[f"at most {FORWARD_BARS[mix_rate]} at {case}"] = mine[case] <= FORWARD_BARS[mix_rate]
        details[case] = why
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), checks, details)


def wall_clock(bench: SingleBench) -> Row:
    """S3: seconds of one batch."""
    mine, peer, checks, details = {}, {}, {}, {}
    # Token by token is far off; the other two are close, and where auto chooses W = 1 they are the same: repeat more.
    repeats, slow = bench.work.sizes.close_repeats, bench.work.sizes.repeats
    for mix_rate in MIX_RATES:
        case = f"{mix_rate}"
        requests = next(bench.batches(mix_rate))
        block, why = bench.auto_block(mix_rate)
        sides = {
            "auto": Side(lambda requests=requests, block=block: bench.sample(requests, block)[0], repeats),
            "token by token": Side(lambda requests=requests: bench.token_by_token(requests), slow),
            "coin to coin": Side(lambda requests=requests: bench.sample(requests, 1)[0], repeats),
        }
        if block == 1:  # auto has chosen coin to coin: the same work, timed twice as often
            sides["coin to coin"] = sides["auto"]
        interleave(sides, bench.world)
        wrong = different_rows(sides["auto"].results[0], sides["token by token"].results[0])
        mine[case] = sides["auto"].median
        peer[case] = {name: sides[name].median for name in ("token by token", "coin to coin")}
        checks[f"tokens identical at {case}"] = wrong == 0
        better = min(peer[case].values())
        checks[f"not below 0.95x the better of (a), (b) at {case}"] = better >= 0.95 * mine[case]
        if mix_rate == MIX_RATES[0]:
            checks[f"at least 1.5x token by token at {case}"] = peer[case]["token by token"] >= 1.5 * mine[case]
        details[case] = {
            **why,
            "seconds": {name: side.seconds for name, side in sides.items()},
        }
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), checks, details)


def second_visit(bench: SingleBench) -> Row:
    """S6: contexts of a second visit after a few optimizer steps, guessed from the first visit's output."""
    sizes = bench.work.sizes
    first_requests = {rate: bench.work.contexts(rate, sizes.rows) for rate in MIX_RATES}
    first = {rate: bench.sample(requests, None) for rate, requests in first_requests.items()}
    before = {name: tensor.clone() for name, tensor in bench.module.state_dict().items()}
    _train(bench, first_requests[MIX_RATES[0]])
    mine, peer, details = {}, {}, {"train_steps": sizes.train_steps}
    for rate in MIX_RATES:
        results, stats = first[rate]
        for noise, visit in (("common", 0), ("fresh", 1)):
            earlier = [result.tokens for result in results]
            requests = bench.work.contexts(rate, sizes.rows, visit=visit, guesses=earlier)
            again, again_stats = bench.sample(requests, None)
            gold, gold_stats = bench.sample(bench.work.contexts(rate, sizes.rows, visit=visit), None)
            case = f"{rate} {noise}"
            mine[case] = again_stats.calls
            peer[case] = {"first visit": stats.calls, "second visit, gold as the guess": gold_stats.calls}
            details[case] = {
                "passes": statistics.mean(one.passes for one in again),
                "passes_first_visit": statistics.mean(one.passes for one in results),
                "accepted_guess_share": statistics.mean(map(accepted_share, requests, again)),
                "tokens_identical_to_gold_guess": [a.tokens for a in again] == [g.tokens for g in gold],
            }
    bench.module.load_state_dict(before)
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), {}, details)


def accepted_share(request: Request, result: Sampled) -> float:
    """Share of the coins before the first that the guess got wrong."""
    coins = [t for t, coin in enumerate(request.coins) if coin]
    held = next((n for n, t in enumerate(coins) if request.guess_ids[t] != result.tokens[t]), len(coins))
    return held / len(coins) if coins else 1.0


def _train(bench: SingleBench, requests: list[Request]) -> None:
    """A few plain optimizer steps on the same examples, so that the weights are not the first visit's."""
    optimizer = torch.optim.AdamW(bench.module.parameters(), lr=2e-5)
    for _ in range(bench.work.sizes.train_steps):
        for request in requests:
            ids_1L = torch.tensor([request.prompt_ids + request.guess_ids], device=bench.world.device)
            labels_1L = ids_1L.clone()
            labels_1L[:, : len(request.prompt_ids)] = -100
            loss = bench.module(input_ids=ids_1L, labels=labels_1L, use_cache=False).loss
            (loss / len(requests)).backward()
        optimizer.step()
        optimizer.zero_grad()


ROWS = {"S1": calls, "S2": token_forwards, "S3": wall_clock, "S6": second_visit}

"""How many coins to try in one pass: `block: auto` weighs model calls against repeated arithmetic.

The cost of a call against its width is measured once, on this model, device and strategy. Then, for every round, the
sampler's own loop runs on that cost alone, over the round's real coins and lengths, for each candidate W, with draws
that miss the guess and flip at rates measured on a real model. The W that ends first is taken; which one it is changes
the cost of the tokens and nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ssgen_ds.run.files import write_whole
from ssgen_ds.sampler.call_cost import CallCost, measure_call_cost
from ssgen_ds.sampler.draw import Draw
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler, deal
from ssgen_ds.sampler.fixed_point import iterate
from ssgen_ds.sampler.requests import Request
from ssgen_ds.sampler.rows import Feed

CANDIDATES: tuple[int | None, ...] = (1, 2, 4, 8, 16, 32, None)  # None: all coins
# Measured on SmolLM2-135M-Instruct over FiQA answers at temperature 1: the share of first draws that are not the gold
# token, and of redraws that differ from the last, which grows with the share of coins (.27, .31, .46 at .1, .25, .5).
MISS_RATE = 0.85
FLIP_RATE, FLIP_RATE_PER_SHARE = 0.22, 0.45
WORTH_IT = 0.85  # of W = 1's seconds: predictions were off by up to 15 %, so one that gains less is not trusted
# A look-up gains at most 1.17 tokens a call at these rates and feeds only what it proposes: little is staked on it.
WORTH_IT_DRAFTS = 0.95
FEWEST_CALLS = 50  # of one-token calls, for which measuring what calls cost pays
_REQUESTS = 128  # simulated at most, and no fewer than two batches


@dataclass(frozen=True)
class LookupRates:
    """How good look-ups are. propose: share of a row's passes in which one proposes tokens. hold: the chance that a
    proposed token is the one sampled, when all proposed before it were."""

    propose: float
    hold: float


# Measured on SmolLM2-135M-Instruct over XSum and FiQA. Drafts are first visits at temperature 1, with the gold answer
# to look up in. Answers look up in their prompt and in themselves; corrections also in the answer that they correct.
# Sampled ones were drawn at temperature 1.
DRAFTS = LookupRates(0.25, 0.4)
GREEDY_ANSWERS, SAMPLED_ANSWERS = LookupRates(0.23, 0.7), LookupRates(0.07, 0.65)
GREEDY_CORRECTIONS, SAMPLED_CORRECTIONS = LookupRates(0.92, 0.9), LookupRates(0.63, 0.77)


def predict_seconds(cost: CallCost, mine: list[Request], block: int | None, rows: int) -> float:
    """Seconds that a rank takes for its requests, `rows` at a time, by the sampler's loop on a model of costs."""
    coins = sum(sum(request.coins) for request in mine)
    share = coins / max(1, sum(len(request.coins) for request in mine))
    draws = _CostDraws(cost, MISS_RATE, FLIP_RATE + FLIP_RATE_PER_SHARE * share)
    iterate(draws, mine, block, rows)
    return draws.seconds


def choose_block(
    cost: CallCost, requests: list[Request], limit: BatchLimit, world_size: int
) -> tuple[int | None, dict[str, float]]:
    """The W with the least predicted seconds, 1 unless another is clearly better; and all predictions, by name."""
    rows = limit.rows_for(requests)
    mine = [requests[i] for i in deal(requests, 0, world_size)]
    some = mine[:: -(-len(mine) // max(_REQUESTS, 2 * rows)) or 1]
    seconds = {block_name(block): predict_seconds(cost, some, block, rows) for block in CANDIDATES}
    block = min(CANDIDATES, key=lambda block: seconds[block_name(block)])
    return (block if seconds[block_name(block)] <= WORTH_IT * seconds[block_name(1)] else 1), seconds


def choose_draft_block(cost: CallCost, rows: int, rates: LookupRates = DRAFTS) -> int:
    """W for free decoding with look-ups: most tokens a second at these rates."""

    def tokens_per_second(block: int) -> float:
        accepted = 1 + rates.propose * sum(rates.hold**i for i in range(1, block))
        fed = round(rows * (1 + rates.propose * (block - 1)))
        return rows * accepted / cost.of(fed, fed)

    block = max((b for b in CANDIDATES if b is not None), key=tokens_per_second)
    return block if tokens_per_second(block) * WORTH_IT_DRAFTS >= tokens_per_second(1) else 1


def block_name(block: int | None) -> str:
    return "all" if block is None else str(block)


@dataclass
class BlockChooser:
    """`selfgen.block` of the recipe: a number, `all`, or `auto`, which measures once and then chooses for every round.

    Args:
        setting: 1 and up, "all" or "auto".
        sampler: what will sample; its measured cost decides.
        vocab_size: of the model.
        say: shows a line to the user; rank 0 only.
        file: where the measured cost is kept, so that a resumed run chooses alike; None keeps it in memory.
    """

    setting: int | str
    sampler: EngineSampler
    vocab_size: int
    say: Callable[[str], None] = lambda line: None
    file: Path | None = None
    _cost: CallCost | None = field(default=None, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def mixing(self, requests: list[Request]) -> int | None:
        """W for mixed contexts. All ranks call it with the same requests, while the sampler is `ready`."""
        if self.setting != "auto":
            return None if self.setting == "all" else int(self.setting)
        cost, world = self._measured(requests), self.sampler.world
        block, seconds = world.broadcast(
            choose_block(cost, requests, self.sampler.limit, world.size) if world.is_main else (None, {})
        )
        predicted = ", ".join(f"W={key} {value:.3g} s" for key, value in seconds.items())
        chosen = block_name(block)
        self._say(f"selfgen.block auto: W = {chosen} for mixed contexts ({predicted})", f"mixing {chosen}")
        return block

    def drafting(self, requests: list[Request]) -> int | None:
        """W for drafts and rewrites, as `mixing`: an upper limit, as only tokens that a guess proposes are tried."""
        if self.setting != "auto":
            return None if self.setting == "all" else int(self.setting)
        cost, world = self._measured(requests), self.sampler.world
        rows = self.sampler.limit.rows_for(requests)
        block = world.broadcast(choose_draft_block(cost, rows) if world.is_main else 1)
        self._say(f"selfgen.block auto: W = {block} for drafts, where a look-up proposes tokens", f"drafts {block}")
        return block

    def answering(self, requests: list[Request], rates: LookupRates) -> int | None:
        """W for answers of one greatest length: 1 where they are too few for the choice to pay."""
        if self.setting != "auto":
            return None if self.setting == "all" else int(self.setting)
        world, rows = self.sampler.world, self.sampler.limit.rows_for(requests)
        if len(requests[0].coins) * -(-len(requests) // (rows * world.size)) < FEWEST_CALLS:
            return 1
        cost = self._measured(requests)
        return world.broadcast(choose_draft_block(cost, rows, rates) if world.is_main else 1)

    def _say(self, line: str, key: str) -> None:
        """Once for each choice, on rank 0."""
        if self.sampler.world.is_main and key not in self._said:
            self.say(line)
            self._said.add(key)

    def _measured(self, requests: list[Request]) -> CallCost:
        if self._cost is None:
            setup = self._setup()
            world = self.sampler.world
            known = world.broadcast(_read(self.file, setup) if world.is_main else None)
            self._cost = known or measure_call_cost(self.sampler, self.vocab_size, requests)
            if known is None and self.file is not None:
                cost = self._cost
                world.together(lambda: self._keep(cost, setup) if world.is_main else None)
            first, last = self._cost.seconds[0], self._cost.seconds[-1]
            self._say(
                f"a {self.sampler.strategy.name} model call takes {first * 1e3:.0f} ms for {self._cost.fed[0]} tokens "
                f"and {last * 1e3:.0f} ms for {self._cost.fed[-1]}, a draw {self._cost.per_draw * 1e3:.2f} ms"
                + (" (measured when the run began)" if known else ""),
                "cost",
            )
        return self._cost

    def _keep(self, cost: CallCost, setup: dict[str, Any]) -> None:
        assert self.file is not None
        self.sampler.world.phases.tick("call-cost")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps({"setup": setup, "cost": asdict(cost)}, indent=1))

    def _setup(self) -> dict[str, Any]:
        """What the measured cost belongs to; another setup is measured anew."""
        sampler = self.sampler
        device = sampler.world.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": sampler.world.size,
            "strategy": sampler.strategy.name,
            "dtype": str(sampler.module.dtype),
            "rows": sampler.limit.rows,
        }


def _read(file: Path | None, setup: dict[str, Any]) -> CallCost | None:
    """The cost kept by this run, if it was measured in the same setup; a file that is damaged is made again."""
    if file is None or not file.is_file():
        return None
    try:
        kept = json.loads(file.read_bytes().rstrip(b"\0"))
        cost = TypeAdapter(CallCost).validate_python(kept["cost"])
        is_known = kept["setup"] == setup and len(cost.fed) == len(cost.seconds) >= 2
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return cost if is_known else None


@dataclass
class _CostDraws:
    """The sampler's `Draws` without a model: random misses and flips, and the seconds that the calls would take."""

    cost: CallCost
    miss_rate: float
    flip_rate: float
    seconds: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def open(self, rows: int, capacity: int) -> None: ...

    def keep(self, positions: list[int]) -> None: ...

    def __call__(self, feeds: list[Feed]) -> list[Draw]:
        draws = []
        for feed in feeds:
            for t in feed.coins:
                rate = self.flip_rate if t in feed.row.previous else self.miss_rate
                token = feed.row.tokens[feed.row.start + t]
                draws.append(Draw(token ^ 1 if self.rng.random() < rate else token))
        self.seconds += self.cost.of(sum(feed.end - feed.begin for feed in feeds), len(draws))
        return draws

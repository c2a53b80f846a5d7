import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from ssgen_ds.distributed.phases import Phases
from ssgen_ds.sampler import block as module
from ssgen_ds.sampler import call_cost
from ssgen_ds.sampler.block import BlockChooser, block_name, choose_block, choose_draft_block, predict_seconds
from ssgen_ds.sampler.call_cost import CallCost, measure_call_cost
from ssgen_ds.sampler.engine import BatchLimit, deal
from ssgen_ds.sampler.fixed_point import iterate
from ssgen_ds.sampler.limits import MOST_LOGITS, MOST_TOKENS
from ssgen_ds.sampler.requests import CallLimit, Request
from ssgen_ds.sampler.strategy import Local, Sharded, Strategy
from ssgen_ds.selfgen.bss import draw_coins
from tests.support.card_costs import H100, H100_SHARDED, RTX_4090_LORA, Card, CardDraws, CardModel

ARITHMETIC = CallCost((8, 32, 128, 256), (0.08, 0.32, 1.28, 2.56), 0.01)  # 10 ms a token, 10 ms a draw
OVERHEAD = CallCost((8, 32, 128, 256), (1.0, 1.0, 1.0, 1.0), 0.0)
MIXED = CallCost((8, 32, 128, 256), (0.1, 0.15, 0.4, 0.8), 0.001)
LIMIT = BatchLimit(8)


def requests(count: int = 12, length: int = 40, every: int = 3) -> list[Request]:
    return [Request([1, 2, 3], [5] * length, [t % every == 0 for t in range(length)], key=i) for i in range(count)]


def test_cost_is_linear_between_measurements_and_beyond():
    cost = CallCost((10, 20, 40), (1.0, 2.0, 3.0), 0.5)
    assert cost.of(10, 0) == 1.0
    assert cost.of(15, 0) == 1.5
    assert cost.of(30, 2) == 2.5 + 1.0
    assert cost.of(60, 0) == 4.0
    assert cost.of(5, 0) == 0.5
    assert CallCost((10, 20), (1.0, 3.0), 0.0).of(2, 0) == 0.0  # never negative


def test_one_coin_at_a_time_costs_its_calls_tokens_and_draws():
    """Coins at 0, 3, 6, 9 of one row: calls feed the prompt (3), then 3 tokens each."""
    request = Request([1, 2, 3], [5] * 10, [t % 3 == 0 for t in range(10)], key=0)
    cost = CallCost((1, 2), (1.1, 1.2), 0.01)  # 1 s a call, 0.1 s a token
    assert predict_seconds(cost, [request], 1, 1) == pytest.approx(4 * (1 + 0.3 + 0.01))


@pytest.mark.parametrize("cost", [ARITHMETIC, OVERHEAD, MIXED])
@pytest.mark.parametrize("every", [1, 2, 10])
def test_the_choice_is_never_predicted_slower_than_one_coin(cost, every):
    block, seconds = choose_block(cost, requests(every=every), LIMIT, 2)
    assert seconds[block_name(block)] <= seconds["1"]
    assert len(seconds) == len(module.CANDIDATES)


def test_extremes():
    assert choose_block(ARITHMETIC, requests(), LIMIT, 1)[0] == 1
    block, _ = choose_block(OVERHEAD, requests(), LIMIT, 1)
    assert block is None or block >= 4
    assert choose_draft_block(ARITHMETIC, 8) == 1
    assert choose_draft_block(OVERHEAD, 8) == 32


@dataclass
class Sampler:
    """What a chooser asks of a sampler."""

    limit: BatchLimit = LIMIT
    strategy: Strategy = field(default_factory=Local)
    world: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            device=torch.device("cpu"),
            size=1,
            is_main=True,
            broadcast=lambda item: item,
            together=lambda work: work(),
            phases=Phases(),
        )
    )
    module: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(dtype=torch.float32))
    ready = staticmethod(nullcontext)


def test_measured_once_kept_and_measured_anew_elsewhere(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        module, "measure_call_cost", lambda sampler, vocab_size, requests: measured.append(vocab_size) or MIXED
    )
    file, lines = tmp_path / "selfgen" / "call_cost.json", []
    chooser = BlockChooser("auto", Sampler(), 96, lines.append, file)
    chosen = chooser.mixing(requests()), chooser.drafting(requests()), chooser.mixing(requests())
    assert measured == [96]
    assert len(lines) == 3  # the cost, W for contexts, W for drafts: each once
    resumed = BlockChooser("auto", Sampler(), 96, lines.append, file)
    assert (resumed.mixing(requests()), resumed.drafting(requests()), resumed.mixing(requests())) == chosen
    assert measured == [96]
    assert resumed._measured(requests()) == MIXED
    BlockChooser("auto", Sampler(strategy=Sharded(None, None)), 96, lines.append, file).drafting(requests())
    assert measured == [96, 96]
    for damage in (b"", b"{", b"[]", b'{"setup": {}}', b"\xff\0", b'{"setup": 1, "cost": {"fed": [1], "seconds": []}}'):
        file.write_bytes(damage)
        BlockChooser("auto", Sampler(), 96, lines.append, file).drafting(requests())
        assert json.loads(file.read_text())["setup"]["strategy"] == "local", "measured again, and kept"


@pytest.mark.parametrize(("setting", "block"), [(3, 3), ("all", None)])
def test_a_named_block_measures_nothing(setting, block):
    chooser = BlockChooser(setting, Sampler(), 96)
    assert (chooser.mixing([]), chooser.drafting([])) == (block, block)


def cost_on(card: Card, limit: BatchLimit, contexts: list[Request], monkeypatch) -> CallCost:
    model, sampler = CardModel(card), Sampler(limit)
    sampler.world.max = float
    sampler.model = lambda: model
    monkeypatch.setattr(call_cost.time, "perf_counter", model.clock)
    monkeypatch.setattr(call_cost, "draw_tokens", model.draw)
    return measure_call_cost(sampler, 100, contexts)


@pytest.mark.parametrize(("prompt", "response"), [(1, 1), (1, 2), (2, 3), (40, 3)])
def test_texts_of_a_few_tokens_have_a_cost_too(prompt, response, monkeypatch):
    """Only calls as wide as the longest text are measured; one width alone would be no line."""
    contexts = [Request([5] * prompt, [7] * response, [True] * response, key=i) for i in range(3)]
    cost = cost_on(H100, BatchLimit(8, call=CallLimit(64, 64)), contexts, monkeypatch)
    assert len(cost.fed) == len(cost.seconds) >= 2 and cost.fed[-1] <= 8 * (prompt + response)
    assert choose_block(cost, contexts, LIMIT, 1)[0] in module.CANDIDATES


SETUPS = {
    # card, ranks, requests a rank, rows at a time, mix rate
    "8 H100, gathered, .1": (H100, 8, 128, 64, 0.1),
    "8 H100, gathered, .25": (H100, 8, 128, 64, 0.25),
    "8 H100, sharded, .1": (H100_SHARDED, 8, 128, 64, 0.1),
    "32 H100, gathered, .1": (H100, 32, 32, 32, 0.1),
    "4090, LoRA, .1": (RTX_4090_LORA, 1, 128, 14, 0.1),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_auto_is_near_the_best_on_a_gpu(setup, monkeypatch):
    """By published rates, for responses of 256 to 768 tokens after prompts of as many.

    On these cards `auto` chose W up to three times slower than the best, before it measured as wide as calls are and
    simulated as many requests as a rank has.
    """
    card, ranks, each, rows, rate = SETUPS[setup]
    rng = random.Random(0)
    lengths = [(rng.randrange(256, 768), rng.randrange(256, 768)) for _ in range(ranks * each)]
    contexts = [
        Request([5] * prompt, [7] * response, draw_coins(response, rate, i), key=i)
        for i, (prompt, response) in enumerate(lengths)
    ]
    limit = BatchLimit(rows, call=CallLimit(MOST_TOKENS, MOST_LOGITS))
    cost = cost_on(card, limit, contexts, monkeypatch)
    chosen, predicted = choose_block(cost, contexts, limit, ranks)
    share = sum(sum(one.coins) for one in contexts) / sum(len(one.coins) for one in contexts)
    mine = [contexts[i] for i in deal(contexts, 0, ranks)]
    taken = {}
    for block in module.CANDIDATES:
        draws = CardDraws(card, module.MISS_RATE, module.FLIP_RATE + module.FLIP_RATE_PER_SHARE * share)
        iterate(draws, mine, block, rows)
        taken[block_name(block)] = draws.seconds
    assert taken[block_name(chosen)] <= 1.1 * min(taken.values()), (chosen, taken, predicted)

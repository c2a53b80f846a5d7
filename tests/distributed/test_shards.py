"""Generation under ZeRO-3 on two real ranks, every parameter partitioned, in both strategies."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ssgen_ds.errors import StopRequested
from ssgen_ds.modeling import shards
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.requests import Request
from ssgen_ds.selfgen.bss import bss_request
from ssgen_ds.train import fit_and_export
from ssgen_ds.training.build import build_trainer
from ssgen_ds.training.foundations import lay_foundations
from ssgen_ds.training.step import train_step
from tests.support.rank_runs import (
    PARTITIONED,
    a_window,
    assert_generation_leaves_training_as_it_was,
    fresh,
    trainer_for,
    uneven_answers,
    zero,
)
from tests.support.ranks import ranks
from tests.support.stopping import stopping

STRATEGIES = ("sharded", "gathered")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FaultError(Exception):
    """Raised on purpose."""


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """Every hook of every module: its dictionary, number and identity, in order."""
    dicts = [getattr(part, name) for part in module.modules() for name in _HOOKS]
    return [(id(hooks), [(number, id(hook)) for number, hook in hooks.items()]) for hooks in dicts]


def whole_layers(module: torch.nn.Module) -> tuple[int, ...]:
    """Decoder layers of which some parameter is whole."""
    layers = module.model.layers
    whole = [i for i, one in enumerate(layers) if any(p.ds_status.name == "AVAILABLE" for p in one.parameters())]
    return tuple(whole)


def statuses(module: torch.nn.Module) -> list[str]:
    return sorted({parameter.ds_status.name for parameter in module.parameters()})


def some_requests() -> list[Request]:
    return [free_request([5, 6, 7], 6 + 3 * i, 11 * i, frozenset({2})) for i in range(3)]


@ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_generation_leaves_training_as_it_was(world, folder, strategy, adapter):
    assert_generation_leaves_training_as_it_was(world, folder, adapter, PARTITIONED, selfgen__strategy=strategy)


@ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [1, 5])
def test_tokens_are_those_of_whole_parameters(world, folder, strategy, number):
    partitioned = uneven_answers(world, folder, number, deepspeed=PARTITIONED, selfgen__strategy=strategy)
    assert partitioned == uneven_answers(world, folder, number, deepspeed=zero(0))


@pytest.fixture
def coalesced(monkeypatch) -> list[int]:
    """Gathered by DeepSpeed's own call, which is the only one on a GPU; how many parameters each time."""
    made: list[int] = []
    real = shards._gather_coalesced

    def gather(parameters: list[Any]) -> Any:
        made.append(len(parameters))
        return real(parameters)

    monkeypatch.setattr(shards, "_is_plain", lambda parameter: False)
    monkeypatch.setattr(shards, "_gather_coalesced", gather)
    return made


@ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gathered_as_on_a_gpu_the_tokens_are_the_same(world, folder, strategy, coalesced):
    partitioned = uneven_answers(world, folder, 5, deepspeed=PARTITIONED, selfgen__strategy=strategy)
    assert coalesced, "DeepSpeed's call was made"
    assert partitioned == uneven_answers(world, folder, 5, deepspeed=zero(0))


@ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gathered_as_on_a_gpu_partitions_come_back(world, folder, strategy, coalesced):
    watched = Watched(world, folder, strategy)
    tokens = watched.sample()
    assert statuses(watched.module) == ["NOT_AVAILABLE"]
    assert all(world.gather(watched.sample_with_an_error()))
    assert statuses(watched.module) == ["NOT_AVAILABLE"]
    assert watched.sample() == tokens
    assert train_step(watched.engine, a_window(world), 1e-2, world).loss > 0


class Watched:
    """A trainer of which each forward of a layer is seen, and may fail."""

    def __init__(self, world: Any, folder: Path, strategy: str) -> None:
        settings = {"adapter__kind": "none", "deepspeed": PARTITIONED, "selfgen__strategy": strategy}
        trainer = trainer_for(fresh(folder, f"parameters-{strategy}", world, **settings), world)
        self.engine, self.sampler = trainer.engine, trainer.generator.sampler
        self.module = trainer.engine.module
        self.layers_whole: list[tuple[int, ...]] = []
        self.until_error = 0  # forwards of a layer; none fails at 0

        def look(*_: Any) -> None:
            self.layers_whole.append(whole_layers(self.module))
            if self.until_error:
                self.until_error -= 1
                if not self.until_error:
                    raise FaultError

        self.handles = [layer.mlp.register_forward_hook(look) for layer in self.module.model.layers]

    def sample(self) -> list[list[int]]:
        results, _, _ = self.sampler.sample(some_requests(), Sampling(), 1)
        return [result.tokens for result in results]

    def sample_with_an_error(self) -> bool:
        """In the sixth forward of a layer; whether it came through."""
        self.until_error = 6
        try:
            self.sample()
        except FaultError:
            return True
        return False


@ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_and_partitions_come_back(world, folder, strategy):
    """Also after an error in the middle of a forward, on all ranks."""
    watched = Watched(world, folder, strategy)
    train_step(watched.engine, a_window(world), 1e-2, world)
    hooks = hooks_of(watched.module)
    assert watched.sampler.strategy.name == strategy
    assert statuses(watched.module) == ["NOT_AVAILABLE"]
    tokens = watched.sample()
    assert statuses(watched.module) == ["NOT_AVAILABLE"]
    assert hooks_of(watched.module) == hooks
    assert all(world.gather(watched.sample_with_an_error()))
    assert statuses(watched.module) == ["NOT_AVAILABLE"]
    assert hooks_of(watched.module) == hooks
    assert watched.module.training
    assert watched.sample() == tokens
    for handle in watched.handles:
        handle.remove()
    assert train_step(watched.engine, a_window(world), 1e-2, world).loss > 0


@ranks(2)
def test_sharded_holds_one_layer_at_a_time(world, folder):
    for strategy, expected in (("sharded", [(0,), (1,)]), ("gathered", [(0, 1)])):
        watched = Watched(world, folder, strategy)
        watched.sample()
        assert sorted(set(watched.layers_whole)) == expected


@ranks(2)
def test_auto_block_is_agreed_measured_once_and_kept(world, folder):
    """`block: auto` chooses the same number on all ranks; what it measured is used again after a resume."""
    auto = {"selfgen__block": "auto", "selfgen__strategy": "auto"}
    recipe = fresh(folder, "auto-block", world, method__name="bss", deepspeed=PARTITIONED, **auto)
    with suppress(StopRequested):
        fit_and_export(recipe, stopping(world))
    world.barrier()
    file = Path(recipe.output_dir) / "selfgen" / "call_cost.json"
    written = file.stat().st_mtime_ns
    trainer = build_trainer(lay_foundations(recipe, world), world)
    requests = [bss_request(slot.example, 0.5, 7) for slot in trainer.rounds.slots_of(3)]
    blocks, lines = trainer.generator.blocks, []
    blocks.say = lines.append
    with trainer.generator.sampler.ready():
        chosen = world.gather([blocks.mixing(requests), blocks.drafting(requests)])
        trainer.generator.sampler.strategy.finish()
    assert chosen[0] == chosen[1]
    assert trainer.generator.sampler.strategy.name == "gathered"  # a tiny model fits
    assert file.stat().st_mtime_ns == written
    assert any("measured when the run began" in line for line in world.broadcast(lines))

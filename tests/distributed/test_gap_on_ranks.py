"""`ssgen gap` on partitioned parameters, against whole parameters on each rank alone."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssgen_ds.data.tokenize import Example
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import GenerationInterrupted
from ssgen_ds.evaluate.gap_measure import Contexts, GapSettings, Measurement, measure, score_gold
from ssgen_ds.inference.model_source import ModelSource, load_model_source
from ssgen_ds.recipe.deepspeed import inference_config
from ssgen_ds.recipe.schema import ModelConfig, SelfgenConfig
from ssgen_ds.sampler.build import inference_sampler
from tests.support.rank_runs import PARTITIONED
from tests.support.ranks import ranks
from tests.support.stopping import stopping
from tests.support.tiny_models import tiny_model

TOKENS = list(range(5, 60))
EXAMPLES = [Example(f"row-{i}", TOKENS[: 2 + i], None, TOKENS[-i - 1 :], False, "x") for i in range(8)]
EXAMPLES += EXAMPLES[-1:] * 6  # ranks get different numbers of batches
CHAT = SimpleNamespace(banned_ids=lambda vocab_size: [2])


class Alone(World):
    """A rank with nobody else."""

    @classmethod
    def among(cls, world: World) -> Alone:
        groups = [dist.new_group([rank], backend="gloo") for rank in range(world.size)]
        return cls(0, 0, 1, world.device, groups[world.rank])

    def broadcast(self, item: Any) -> Any:
        return item  # its own rank has another number among all


def all_nll(found: Measurement) -> np.ndarray:
    return np.concatenate(
        [item.nll_T for scored in (found.own, found.shared) for scores in scored.values() for item in scores]
    )


@ranks(2)
@pytest.mark.parametrize("strategy", ["sharded", "gathered"])
def test_the_gap_is_that_of_one_process(world, folder, strategy):
    """Its own contexts and another model's; a stop that one rank is asked for ends it on all."""
    selfgen = SelfgenConfig(batch=3, strategy=strategy)

    def measured(model: torch.nn.Module, world: World, first: Contexts | None = None) -> Measurement:
        sampler = inference_sampler(model, selfgen, False, world)
        assert sampler.strategy.name == ("local" if world.size == 1 else strategy)
        return measure(sampler, CHAT, EXAMPLES, 96, GapSettings((0.0, 0.5, 1.0)), first)

    lone = Alone.among(world)
    elsewhere = measured(tiny_model("llama", seed=1), lone).contexts
    expected = measured(tiny_model("llama"), lone, elsewhere)
    model_source = ModelSource(ModelConfig(path=str(folder / "llama")))
    model = load_model_source(model_source, world.device, inference_config(PARTITIONED, world.size))
    found = measured(model, world, elsewhere)
    asked = stopping(world, at="pass") if world.rank == 1 else world
    is_stopped = False
    try:
        score_gold(inference_sampler(model, selfgen, False, asked), EXAMPLES, [found.contexts[1.0]])
    except GenerationInterrupted:
        is_stopped = True
    assert world.gather(is_stopped) == [True, True]
    assert found.contexts == expected.contexts
    assert float(np.abs(all_nll(found) - all_nll(expected)).max()) < 1e-4
    assert found.shared[1.0] is not found.own[1.0]
    digests = world.gather(hashlib.sha256(all_nll(found).tobytes()).hexdigest())
    assert digests[0] == digests[1]
    assert sorted({parameter.ds_status.name for parameter in model.parameters()}) == ["NOT_AVAILABLE"]

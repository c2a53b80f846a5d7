"""`ssgen gap` on partitioned parameters: a case of `test_shards.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ssgen_ds.config import ModelConfig, SelfgenConfig
from ssgen_ds.data.tokenize import Example
from ssgen_ds.distributed import World
from ssgen_ds.ds_config import inference_config
from ssgen_ds.errors import GenerationInterrupted
from ssgen_ds.evaluate.gap import Contexts, GapSettings, Measurement, measure, score
from ssgen_ds.references import Reference, load_reference
from ssgen_ds.selfgen.strategy import inference_sampler
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


def gap_case(strategy: str, zero3_file: str) -> Callable[[World, Path], Any]:
    """Partitioned over all ranks, against whole parameters on each rank alone; then one rank is asked to stop."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        selfgen = SelfgenConfig(batch=3, strategy=strategy)

        def measured(model: torch.nn.Module, world: World, first: Contexts | None = None) -> Measurement:
            sampler = inference_sampler(model, selfgen, False, world)
            assert sampler.strategy == ("local" if world.size == 1 else strategy)
            return measure(sampler, CHAT, EXAMPLES, 96, GapSettings((0.0, 0.5, 1.0)), first)

        lone = Alone.among(world)
        elsewhere = measured(tiny_model("llama", seed=1), lone).contexts
        expected = measured(tiny_model("llama"), lone, elsewhere)
        reference = Reference(ModelConfig(path=str(folder / "llama")))
        model = load_reference(reference, world.device, inference_config(zero3_file, world.size))
        found = measured(model, world, elsewhere)
        asked = stopping(world, at="pass") if world.rank == 1 else world
        is_stopped = False
        try:
            score(inference_sampler(model, selfgen, False, asked), EXAMPLES, [found.contexts[1.0]])
        except GenerationInterrupted:
            is_stopped = True
        return {
            "same_contexts": found.contexts == expected.contexts,
            "largest_difference": float(np.abs(all_nll(found) - all_nll(expected)).max()),
            "shared_differs": found.shared[1.0] is not found.own[1.0],
            "digests": world.gather(hashlib.sha256(all_nll(found).tobytes()).hexdigest()),
            "stopped": world.gather(is_stopped),
            "statuses": sorted({parameter.ds_status.name for parameter in model.parameters()}),
        }

    return case

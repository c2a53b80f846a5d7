"""Generation under ZeRO-3 where every parameter is partitioned: the cases of `test_shards.py`.

The tiny models lie below DeepSpeed's persistence threshold, so with `ds_configs/zero3.json` nothing of them is ever let
go; here the threshold is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ssgen_ds.build import build_trainer, lay_foundations
from ssgen_ds.distributed import World
from ssgen_ds.errors import StopRequested
from ssgen_ds.selfgen.bss import bss_request
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.rac import free_request
from ssgen_ds.selfgen.requests import Request
from ssgen_ds.step import train_step
from ssgen_ds.train import fit_and_export
from ssgen_ds.window import Packing, Sequence, build_window
from tests.distributed.gap_cases import gap_case
from tests.distributed.numerics_cases import (
    Case,
    fresh,
    generation_leaves_no_trace_case,
    trainer_for,
    uneven_case,
)
from tests.support.stopping import stopping

STRATEGIES = ("sharded", "gathered")
PARTITIONED = "tests/support/zero3_all_partitioned.json"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FaultError(Exception):
    """Raised on purpose."""


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """Every hook of every module: its dictionary, number and identity, in order."""
    dicts = [getattr(part, name) for part in module.modules() for name in _HOOKS]
    return [(id(hooks), [(number, id(hook)) for number, hook in hooks.items()]) for hooks in dicts]


def whole_layers(module: torch.nn.Module) -> list[int]:
    """Decoder layers of which some parameter is whole."""
    layers = module.model.layers
    return [i for i, layer in enumerate(layers) if any(p.ds_status.name == "AVAILABLE" for p in layer.parameters())]


def statuses(module: torch.nn.Module) -> list[str]:
    return sorted({parameter.ds_status.name for parameter in module.parameters()})


def some_requests() -> list[Request]:
    return [free_request([5, 6, 7], 6 + 3 * i, 11 * i, frozenset({2})) for i in range(3)]


def parameters_case(strategy: str) -> Case:
    """Hooks and partitions while generating, afterwards, and after an error in mid-generation on all ranks."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        settings = {"adapter__kind": "none", "deepspeed": PARTITIONED, "selfgen__strategy": strategy}
        trainer = trainer_for(fresh(folder, f"parameters-{strategy}", world, **settings), world)
        module, sampler = trainer.engine.module, trainer.generator.sampler
        window = build_window(
            [Sequence([5, 6, 7, 8], [-100, 6, 7, 8])] * 4, Packing(2), world.rank, world.size, world.device
        )
        train_step(trainer.engine, window, 1e-2, world)
        seen: list[list[int]] = []
        fault: list[int] = []  # forwards of a layer until the error

        def look(*_: Any) -> None:
            seen.append(whole_layers(module))
            if fault:
                fault[0] -= 1
                if fault[0] == 0:
                    raise FaultError

        handles = [layer.mlp.register_forward_hook(look) for layer in module.model.layers]
        hooks, before = hooks_of(module), statuses(module)
        results, _, _ = sampler.sample(some_requests(), Sampling(), 1)
        result = {
            "strategy": sampler.strategy,
            "layers_whole": sorted({tuple(layers) for layers in seen}),
            "before": before,
            "after": statuses(module),
            "same_hooks": hooks_of(module) == hooks,
        }
        fault.append(6)
        caught = False
        try:
            sampler.sample(some_requests(), Sampling(), 1)
        except FaultError:
            caught = True
        fault.clear()
        result |= {
            "caught": all(world.gather(caught)),
            "after_error": statuses(module),
            "same_hooks_after_error": hooks_of(module) == hooks,
            "is_training": module.training,
        }
        again, _, _ = sampler.sample(some_requests(), Sampling(), 1)
        result["same_tokens"] = [item.tokens for item in again] == [item.tokens for item in results]
        for handle in handles:
            handle.remove()
        result["trains"] = train_step(trainer.engine, window, 1e-2, world).loss > 0
        return result

    return case


def auto_block_case(world: World, folder: Path) -> dict[str, Any]:
    """`block: auto` chooses the same W on all ranks; what it measured is used again after a resume."""
    recipe = fresh(
        folder,
        "auto-block",
        world,
        method__name="bss",
        deepspeed=PARTITIONED,
        selfgen__block="auto",
        selfgen__strategy="auto",
    )
    file = Path(recipe.output_dir) / "selfgen" / "call_cost.json"
    times = []
    with suppress(StopRequested):
        fit_and_export(recipe, stopping(world))
    world.barrier()
    times.append(file.stat().st_mtime_ns)
    foundations = lay_foundations(recipe, world)
    trainer = build_trainer(foundations, world)
    examples = [slot.example for slot in trainer._slots(2)]
    requests = [bss_request(example, 0.5, 7) for example in examples]
    blocks, lines = trainer.generator.blocks, []
    blocks.say = lines.append
    with trainer.generator.sampler.ready():
        chosen = [blocks.mixing(requests), blocks.drafting()]
        trainer.generator.sampler.finish()
    times.append(file.stat().st_mtime_ns)
    return {
        "chosen": world.gather(chosen),
        "times": times,
        "strategy": trainer.generator.sampler.strategy,
        "lines": lines,
    }


CASES: dict[str, Callable[[World, Path], Any]] = {
    **{
        f"trace-{strategy}-{adapter}": generation_leaves_no_trace_case(
            3, adapter, deepspeed=PARTITIONED, selfgen__strategy=strategy
        )
        for strategy in STRATEGIES
        for adapter in ("none", "lora")
    },
    **{
        f"uneven-{strategy}-{number}": uneven_case(3, number, deepspeed=PARTITIONED, selfgen__strategy=strategy)
        for strategy in STRATEGIES
        for number in (1, 5)
    },
    **{f"uneven-local-{number}": uneven_case(0, number) for number in (1, 5)},
    **{f"parameters-{strategy}": parameters_case(strategy) for strategy in STRATEGIES},
    "auto-block": auto_block_case,
    **{f"gap-{strategy}": gap_case(strategy, PARTITIONED) for strategy in STRATEGIES},
}

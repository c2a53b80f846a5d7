"""What training really allocates, beside what `ssgen plan` said: the cases of `test_plan.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ssgen_ds.distributed import World
from ssgen_ds.plan.run import Hardware, plan_recipe
from tests.distributed.numerics_cases import Case, fresh, trainer_for
from tests.support.tiny_models import save_tiny_model

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "max_position_embeddings": 2048}
SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": "ds_configs/zero0.json"},
    "zero1": {"deepspeed": "ds_configs/zero1.json"},
    "zero2": {"deepspeed": "ds_configs/zero2.json"},
    "zero3": {"deepspeed": "ds_configs/zero3.json"},
    "lora": {"deepspeed": "ds_configs/zero2.json", "adapter__kind": "lora"},
    "checkpointing": {"deepspeed": "ds_configs/zero2.json", "model__gradient_checkpointing": True},
    "8bit": {"deepspeed": "ds_configs/zero1.json", "train__optimizer": "adamw_8bit"},
    "nf4": {"deepspeed": "ds_configs/zero0.json", "adapter__kind": "lora", "quantization__kind": "nf4"},
    "bss": {"deepspeed": "ds_configs/zero2.json", "method__name": "bss"},
    "bss-zero3": {"deepspeed": "ds_configs/zero3.json", "method__name": "bss"},
}


def make_inputs(folder: Path, world: World) -> Path:
    """A model of 7 million parameters, and rows of one length, so that the longest lengths are the real ones."""
    inputs = folder / "plan"
    if world.is_main and not inputs.is_dir():
        save_tiny_model("llama", inputs / "llama", vocab_size=2048, **SHAPE, tie_word_embeddings=False)
        row = {"prompt": "x" * 400, "completion": "y" * 100}
        lines = [json.dumps({"id": str(i), **row}) for i in range(16)]
        (inputs / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    world.barrier()
    return inputs


def peak_of(run: Any) -> int:
    """Most bytes that torch's CPU allocator has handed out at a time, from the beginning of `run` on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def case_of(name: str) -> Case:
    def case(world: World, folder: Path) -> dict[str, float]:
        inputs = make_inputs(folder, world)

        def plan_and_train() -> tuple[Any, int]:
            recipe = fresh(
                inputs,
                f"plan-{name}",
                world,
                **{
                    "data__max_prompt_tokens": 403,
                    "data__max_response_tokens": 101,
                    "train__global_batch": 4 * world.size,
                    "train__micro_batch": 4,
                    "train__max_steps": 2,
                    "selfgen__batch": 4,
                    **SETTINGS[name],
                },
            )
            planned, *_ = plan_recipe(recipe, Hardware(0, world.size, 64e9, "", False))

            def train() -> None:
                trainer = trainer_for(recipe, world)
                with trainer.progress:
                    trainer.fit()

            return planned, peak_of(train)

        # Under ZeRO-3 the profiler now and then misses that something was let go: the least is the nearest.
        runs = [plan_and_train() for _ in range(3 if "zero3" in name else 1)]
        planned, measured = runs[0][0], min(peak for _, peak in runs)
        return {"planned": planned.highest, "measured": world.max(measured), "phases": planned.phases}

    return case


CASES = {name: case_of(name) for name in SETTINGS}

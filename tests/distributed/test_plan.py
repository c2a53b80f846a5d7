"""`ssgen plan` against what torch allocates in real training, on one process and on two ranks."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssgen_ds.plan.run import Hardware, plan_recipe
from tests.support.rank_runs import fresh, trainer_for
from tests.support.ranks import on_each
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


@pytest.fixture(scope="module")
def inputs(world, folder) -> Path:
    """A model of 7 million parameters, and rows of one length, so that the longest lengths are the real ones."""
    inputs = folder / "plan"
    if world.is_main and not inputs.is_dir():
        save_tiny_model("llama", inputs / "llama", vocab_size=2048, **SHAPE, tie_word_embeddings=False)
        row = {"prompt": "x" * 400, "completion": "y" * 100}
        lines = [json.dumps({"id": str(i), **row}) for i in range(16)]
        (inputs / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    world.barrier()
    return inputs


@on_each(1, 2)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_planned_within_15_percent(world, inputs, name, size):
    lengths = {"data__max_prompt_tokens": 403, "data__max_response_tokens": 101}
    batches = {"train__global_batch": 4 * size, "train__micro_batch": 4, "selfgen__batch": 4}
    recipe = fresh(inputs, f"plan-{name}", world, **lengths, **batches, train__max_steps=2, **SETTINGS[name])
    planned, *_ = plan_recipe(recipe, Hardware(0, size, 64e9, "", False))

    def train() -> None:
        trainer = trainer_for(recipe, world)
        with trainer.progress:
            trainer.fit()

    measured = world.max(peak_of(train))
    print(f"planned {planned.highest:.0f} bytes, measured {measured:.0f}")
    assert planned.highest == pytest.approx(measured, rel=0.15)


def count_on_all_threads() -> None:
    """Let torch's CPU allocator count whatever is allocated and freed, by any thread, from now on.

    A profiler alone counts what its own threads do. Tensors that gloo holds are often freed by a thread of gloo, so its
    tally would never come down. The switch has no name in Python.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def peak_of(run: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator has handed out at a time, beyond those before `run`."""
    count_on_all_threads()
    gc.collect()  # what is freed in mid-run counts against the run
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    todo, memory = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.name == "[memory]":
            memory.append((event.start_time_ns, event.extra_fields))
    first = min(memory, key=lambda item: item[0])[1]
    return max(fields.total_allocated for _, fields in memory) - (first.total_allocated - first.alloc_size)

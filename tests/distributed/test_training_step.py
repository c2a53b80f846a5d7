"""One training step on two ranks: its gradients, what a NaN does to it, and its precision."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.modeling.gather import full_state_dict
from ssgen_ds.training.step import accumulate_gradients, train_step
from tests.support.rank_runs import STAGES, a_window, column, fresh, trained, trainer_for, weights_hash, zero
from tests.support.ranks import ranks

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def gradients_of(world, folder) -> Callable[[int, int], Gradients]:
    """Whole gradients of one window, by ZeRO stage and micro batch."""

    @functools.cache
    def gradients(stage: int, micro_batch: int) -> Gradients:
        trainer = trainer_for(fresh(folder, "gradients", world, deepspeed=zero(stage)), world)
        sequences = [
            Sequence([5, 6, 7, 8 + i, *range(20, 20 + 3 * i), 9], [-100, -100, 7, *range(30, 31 + 3 * i), 9])
            for i in range(3)
        ] + [Sequence([40, 41, 42], [-100, -100, 42], weight=0.5)]
        window = build_window(sequences, Packing(micro_batch), world.rank, world.size, world.device)
        accumulate_gradients(trainer.engine, window, world)
        return {name: safe_get_full_grad(value) for name, value in trainer.engine.module.named_parameters()}

    return gradients


def distance(gradients: Gradients, reference: Gradients) -> float:
    """Norm of the difference over the norm of the reference, over all parameters together."""
    assert gradients.keys() == reference.keys()
    difference = sum((gradients[name] - reference[name]).double().square().sum() for name in reference)
    return float((difference / sum(value.double().square().sum() for value in reference.values())).sqrt())


@ranks(1, 2)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_do_not_depend_on_how_the_window_is_cut(world, gradients_of, kept, stage):
    """4 x 1 = 2 x 2 = 1 x 4 = two ranks, at every ZeRO stage: 1e-6 of the gradient's norm."""
    if world.size == 1:
        kept["whole"] = gradients_of(0, 4)
    for micro_batch in (1, 2, 4):
        assert distance(gradients_of(0 if world.size == 1 else stage, micro_batch), kept["whole"]) < 1e-6


@ranks(2)
@pytest.mark.parametrize(
    "off",
    [
        {"method__name": "bss", "method__bss__mix_rate": 0.0},
        {"method__name": "rac", "method__rac__correction_weight": 0.0},
    ],
    ids=["bss", "rac"],
)
def test_a_method_at_rate_zero_is_sft_bit_for_bit(world, folder, off):
    runs = [
        trained(fresh(folder, f"identity-{name}", world, deepspeed=zero(2), **settings), world)
        for name, settings in (("sft", {"method__name": "sft"}), ("off", off))
    ]
    assert weights_hash(runs[0]) == weights_hash(runs[1])


def poison(module: torch.nn.Module, where: str) -> Any:
    """Make each loss NaN, or its gradient alone; the handle takes that away."""

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    return module.get_output_embeddings().register_forward_hook(spoil)


@ranks(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_rank_leaves_the_update_out_on_all(world, folder, stage, where, dtype):
    """Weights stay as they were, and the next step is that of a run which never saw the NaN."""
    recipe = fresh(folder, "nan", world, deepspeed=zero(stage), model__dtype=dtype)
    trainer, window = trainer_for(recipe, world), a_window(world)
    before = full_state_dict(trainer.engine.module)
    handle = poison(trainer.engine.module, where) if world.rank == 1 else None
    skipped = [not train_step(trainer.engine, window, 1e-2, world).is_applied for _ in range(2)]
    if handle is not None:
        handle.remove()
    assert world.gather(skipped) == [[True, True], [True, True]]
    assert_same(full_state_dict(trainer.engine.module), before)
    undisturbed = trainer_for(recipe, world)
    after, expected = (train_step(each.engine, window, 1e-2, world) for each in (trainer, undisturbed))
    assert after == expected
    assert_same(*(full_state_dict(each.engine.module) for each in (trainer, undisturbed)))


def assert_same(one: dict[str, torch.Tensor] | None, two: dict[str, torch.Tensor] | None) -> None:
    """Whole weights are with rank 0 alone."""
    assert all(torch.equal(value, (two or {})[name]) for name, value in (one or {}).items())


@ranks(2)
def test_offloaded_training_is_that_of_the_gpu_resident(world, folder):
    """ZeRO-3 with optimizer and parameters in host memory: DeepSpeed's own CPU Adam, equal to rounding."""
    resident, offloaded = (
        column(trained(fresh(folder, name, world, deepspeed=file, method__name="bss"), world), "loss")
        for name, file in (("resident", zero(3)), ("offloaded", "ds_configs/zero3_offload.json"))
    )
    assert offloaded == pytest.approx(resident, rel=1e-4)


@ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_summed_in_float32_where_the_deepspeed_file_says_so(world, folder, stage):
    """Sixteen times the same micro batch is once: sixteenths add up without rounding, but not in bfloat16."""
    found = {}
    for sums in ("bf16", "fp32"):
        file = folder / f"sums-{sums}-{stage}.json"
        if world.is_main:
            template = json.loads(Path(zero(stage)).read_text())
            file.write_text(json.dumps({**template, "data_types": {"grad_accum_dtype": sums}}))
        world.barrier()
        for count in (1, 16):
            recipe = fresh(folder, "sums", world, deepspeed=str(file), model__dtype="bfloat16")
            trainer = trainer_for(recipe, world)
            row = Sequence([5, 6, 7, 8, 20, 21, 9], [-100, -100, 7, 30, 31, 32, 9])
            window = build_window([row] * (2 * count), Packing(1), world.rank, world.size, world.device)
            accumulate_gradients(trainer.engine, window, world)
            named = trainer.engine.module.named_parameters()
            found[sums, count] = {name: safe_get_full_grad(value).float() for name, value in named}
    assert distance(found["fp32", 16], found["fp32", 1]) < 1e-6
    assert distance(found["bf16", 16], found["bf16", 1]) > 1e-4


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bfloat16_trains_close_to_float32(world, folder, adapter, stage):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"model__dtype": dtype, "model__gradient_checkpointing": True, "adapter__kind": adapter}
        recipe = fresh(folder, dtype, world, method__name="bss", deepspeed=zero(stage), train__lr=1e-3, **settings)
        run = trained(recipe, world)
        losses[dtype] = column(run, "loss")
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"][-1] != losses["bfloat16"][0]
    assert all(isinstance(count, int) for count in column(run, "selfgen_mismatches"))  # shown, never an error

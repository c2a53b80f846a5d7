"""QLoRA, 8-bit optimizers and float32 adapters on this many ranks: the cases of `test_qlora.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ssgen_ds.distributed import World
from ssgen_ds.modeling.nf4 import nf4_layers
from ssgen_ds.train import fit_and_export
from tests.distributed.numerics_cases import Case, fresh, metrics_of, resume_case, trainer_for

STAGES = (0, 1, 2, 3)
QLORA: dict[str, Any] = {"adapter__kind": "lora", "quantization__kind": "nf4", "method__name": "bss+rac"}


def train_case(name: str, stage: int, **overrides: Any) -> Case:
    def case(world: World, folder: Path) -> dict[str, Any]:
        recipe = fresh(folder, f"{name}-zero{stage}", world, deepspeed=f"ds_configs/zero{stage}.json", **overrides)
        torch.manual_seed(world.rank)  # nothing may depend on the global generator
        fit_and_export(recipe, world)
        run_dir = Path(recipe.output_dir)
        adapter = load_file(run_dir / "model" / "adapter_model.safetensors")
        return {
            "rows": metrics_of(run_dir),
            "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in adapter.values()}),
            "names": sorted({name.rpartition(".lora_")[2] for name in adapter}),
        }

    return case


def share_case(stage: int) -> Case:
    """Bytes of the quantised base's codes on each rank, and the number of weights that they stand for."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        file = "tests/support/zero3_all_partitioned.json" if stage == 3 else f"ds_configs/zero{stage}.json"
        recipe = fresh(folder, f"share-{stage}", world, deepspeed=file, **QLORA)
        layers = nf4_layers(trainer_for(recipe, world).engine.module)
        codes = [layer.weight for layer in layers]
        held = sum((p.ds_tensor if stage == 3 else p).numel() * p.element_size() for p in codes)
        alive = sum(p.numel() * p.element_size() for p in codes)
        weights = sum(math.prod(layer.weight.quant_state.shape) for layer in layers)
        return {"held": world.gather(held), "alive": world.gather(alive), "weights": weights}

    return case


CASES = {
    **{f"nf4-zero{stage}": train_case("nf4", stage, **QLORA) for stage in STAGES},
    **{
        f"float32-adapter-zero{stage}": train_case(
            "float32-adapter", stage, adapter__kind="lora", adapter__dtype="float32", model__dtype="bfloat16"
        )
        for stage in STAGES
    },
    **{f"share-{stage}": share_case(stage) for stage in STAGES},
    **{
        f"resume-nf4-zero{stage}": resume_case("lora", stage, "bss+rac", quantization__kind="nf4")
        for stage in (0, 2, 3)
    },
    **{
        f"resume-8bit-zero{stage}": resume_case("none", stage, "bss", train__optimizer="adamw_8bit") for stage in STAGES
    },
    "resume-paged": resume_case("lora", 2, "rac", quantization__kind="nf4", train__optimizer="paged_adamw_8bit"),
}

"""What a rank's memory does while a model loads under ZeRO-3: `-m tests.support.loading_memory FOLDER MODEL` on ranks.

Each rank writes `report-RANK.json`: the size of the model, and the peak resident size while it loads, over what was
resident before. A tiny model is loaded first, which brings in every import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ssgen_ds.modeling.load import load_model
from ssgen_ds.modeling.model_path import resolve_model_path
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.tiny_models import save_tiny_model

ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def resident_mib(key: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def measure(folder: Path, path: str) -> dict[str, float]:
    warm = folder / "warm"
    save_tiny_model("llama", warm)  # in a process group only rank 0 writes
    dist.barrier()
    load_model(ModelConfig(path=str(warm)), AdapterConfig(), ZERO3, device="cpu")
    config = ModelConfig(path=resolve_model_path(path).path)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mib("VmRSS")
    model = load_model(config, AdapterConfig(), ZERO3, device="cpu")
    size = sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters()) / 2**20
    return {"model_mib": size, "peak_growth_mib": resident_mib("VmHWM") - before}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    (folder / f"report-{dist.get_rank()}.json").write_text(json.dumps(measure(folder, sys.argv[2])))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What each rank of test_loading.py runs: `loading_worker.py families|memory FOLDER [MODEL]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import is_deepspeed_zero3_enabled

from ssgen_ds.config import AdapterConfig, ModelConfig
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter, param_groups
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import load_model, load_tokenizer, resolve_model_path
from tests.support.tiny_models import FAMILIES

LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
IDS = torch.arange(3, 23)[None]


def ds_config(bfloat16: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def start(model: torch.nn.Module, lr: float, bfloat16: bool = False) -> Any:
    optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=lr)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(bfloat16))[0]


def train(engine: Any, ids: torch.Tensor, steps: int) -> list[float]:
    """`steps` updates on one sequence; the loss before each, and after the last."""
    losses = []
    engine.train()
    for _ in range(steps):
        loss = engine(ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        losses.append(engine(ids, labels=ids, use_cache=False).loss.item())
    return losses


def check_family(folder: Path, family: str, rank: int) -> dict[str, Any]:
    config = ModelConfig(path=str(folder / "in" / family))
    model = load_model(config, AdapterConfig(), ds_config(), device="cpu")
    alive = is_deepspeed_zero3_enabled()
    held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    placeholders = sum(parameter.numel() for parameter in model.parameters())
    save_model(model, load_tokenizer(config), folder / "full" / family, config.path, is_main=rank == 0)
    engine = start(model, 1e-3)
    engine.eval()
    with torch.no_grad():
        torch.save(engine(IDS, use_cache=False).logits, folder / f"logits-{family}-{rank}.pt")
    streamed = not hasattr(model, "_weight_conversions")
    engine.destroy()
    return {"held": held, "placeholders": placeholders, "config_alive": alive, "streamed": streamed}


def check_experts(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks see different tokens, and so use different experts (one of four for each token)."""
    model = load_model(ModelConfig(path=str(folder / "in" / "mixtral")), AdapterConfig(), ds_config(), device="cpu")
    routed: set[int] = set()
    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_hook(lambda _, __, out: routed.update(out[2].flatten().tolist()))
    engine = start(model, 1e-2)
    losses = train(engine, torch.full((1, 4), 5 + 40 * rank), 1)
    first_step = sorted(routed)
    losses += train(engine, IDS + rank, 4)[1:]
    engine.destroy()
    return {"losses": losses[-4:], "routed": first_step}


def check_adapter(folder: Path, rank: int) -> dict[str, Any]:
    path = str(folder / "in" / "llama")
    config = ModelConfig(path=path)
    engine = start(apply_adapter(load_model(config, LORA, ds_config(), device="cpu"), LORA, None, seed=0), 1e-2)
    losses = train(engine, IDS, 4)
    with torch.no_grad():
        torch.save(engine(IDS, use_cache=False).logits, folder / f"logits-adapter-{rank}.pt")
    save_model(engine.module, load_tokenizer(config), folder / "adapter", path, is_main=rank == 0)
    engine.destroy()
    dist.barrier()
    model = load_model(config, LORA, ds_config(), device="cpu")
    engine = start(apply_adapter(model, LORA, str(folder / "adapter"), seed=1), 1e-2)
    resumed = train(engine, IDS, 1)
    engine.destroy()
    return {"loss_before": losses[0], "loss_after": losses[-1], "resumed_loss": resumed[0]}


def check_bfloat16(folder: Path) -> dict[str, Any]:
    config = ModelConfig(path=str(folder / "in" / "llama"), dtype="bfloat16", gradient_checkpointing=True)
    model = apply_adapter(load_model(config, LORA, ds_config(True), device="cpu"), LORA, None, seed=0)
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    engine = start(model, 1e-2, bfloat16=True)
    losses = train(engine, IDS, 3)
    engine.destroy()
    return {"dtypes": dtypes, "losses": losses}


def check_broken(folder: Path, rank: int) -> dict[str, Any]:
    """Rank 0 alone reads weights, so rank 0 alone can see that they are damaged."""
    broken = folder / "broken"
    if rank == 0:
        broken.mkdir()
        (broken / "config.json").write_bytes((folder / "in" / "llama" / "config.json").read_bytes())
        (broken / "model.safetensors").write_bytes(b"damaged")
    dist.barrier()
    try:
        load_model(ModelConfig(path=str(broken)), AdapterConfig(), ds_config(), device="cpu")
    except UserError as error:
        return {"error": str(error)}
    return {"error": "none"}


def check_groups(folder: Path) -> dict[str, Any]:
    model = load_model(ModelConfig(path=str(folder / "in" / "gpt2")), AdapterConfig(), ds_config(), device="cpu")
    return {"sizes": [len(group["params"]) for group in param_groups(model, 0.1)]}


def families(folder: Path, rank: int) -> dict[str, Any]:
    report = {family: check_family(folder, family, rank) for family in FAMILIES}
    report["experts"] = check_experts(folder, rank)
    report["adapter"] = check_adapter(folder, rank)
    report["bfloat16"] = check_bfloat16(folder)
    report["broken"] = check_broken(folder, rank)
    report["groups"] = check_groups(folder)
    return report


def _resident_mib(key: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def memory(folder: Path, path: str) -> dict[str, Any]:
    """Peak resident size while loading, over what was resident before. A tiny load first brings in every import."""
    from tests.support.tiny_models import save_tiny_model

    warm = folder / "warm"
    save_tiny_model("llama", warm)  # in a process group only rank 0 writes
    dist.barrier()
    load_model(ModelConfig(path=str(warm)), AdapterConfig(), ds_config(), device="cpu")
    config = ModelConfig(path=resolve_model_path(path).path)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident_mib("VmRSS")
    model = load_model(config, AdapterConfig(), ds_config(), device="cpu")
    size = sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters()) / 2**20
    return {"model_mib": size, "peak_growth_mib": _resident_mib("VmHWM") - before}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[2])
    report = families(folder, rank) if sys.argv[1] == "families" else memory(folder, sys.argv[3])
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

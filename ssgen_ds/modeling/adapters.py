"""LoRA adapters, and what the optimizer is given: trainable parameters only, with and without weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.gather import full_shape

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ssgen_ds.config import AdapterConfig


def apply_adapter(
    model: torch.nn.Module, adapter_config: AdapterConfig, adapter_path: str | None, seed: int
) -> PeftModel:
    """Wrap `model` with a trainable LoRA adapter: a new one, or the one saved at `adapter_path`.

    New weights come from `seed` alone, so they are the same on every rank; the caller's random state is left as it
    was. The adapter has the base's dtype, or is float32 where the recipe says so. Works on a model that ZeRO-3 has
    already partitioned.

    Raises:
        UserError: no such target modules (the message lists those there are), or no adapter at `adapter_path`.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter_path is not None:
        read_adapter_config(adapter_path)
        adapted = PeftModel.from_pretrained(model, adapter_path, is_trainable=True, autocast_adapter_dtype=False)
        return _in_dtype(adapted, adapter_config)
    _check_targets(model, adapter_config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter_config.rank,
        lora_alpha=adapter_config.alpha,
        lora_dropout=adapter_config.dropout,
        target_modules=adapter_config.target_modules,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU; torch.manual_seed would touch CUDA too
        return _in_dtype(get_peft_model(model, lora, autocast_adapter_dtype=False), adapter_config)


def _in_dtype(adapted: PeftModel, adapter_config: AdapterConfig) -> PeftModel:
    """The adapter in the base's dtype, whatever it was saved in, or in float32."""
    import torch

    dtype = torch.float32 if adapter_config.dtype == "float32" else adapted.dtype
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def read_adapter_config(path: str) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises:
        UserError: no such folder, not an adapter, or no weights in it.
    """
    import json

    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"model.adapter_path: {path} is no adapter folder: it has no adapter_config.json")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise UserError(f"model.adapter_path: {path} has no adapter weights (adapter_model.safetensors)")
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last name components of the modules that LoRA can adapt, output head left out: `["down_proj", ...]`."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
    )


def _check_targets(model: torch.nn.Module, targets: str | list[str]) -> None:
    """A list names modules by the end of their path; a plain string is peft's: all-linear, or a pattern."""
    import re

    modules = [name for name, _ in model.named_modules()]
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in modules) else [targets]
    else:
        missing = [one for one in targets if not any(name == one or name.endswith(f".{one}") for name in modules)]
        if not targets:
            raise UserError("adapter.target_modules: names no module; use all-linear")
    if missing:
        there = ", ".join(linear_names(model))
        raise UserError(f"adapter.target_modules: {', '.join(missing)}: no such modules; there are {there}")


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: matrices and embeddings decay; norms, biases and vectors do not.

    Each group has `params` and `weight_decay`; empty groups are left out, because DeepSpeed refuses them.
    """
    decay: list[torch.nn.Parameter] = []
    keep: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if len(full_shape(parameter)) > 1 else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

"""LoRA adapters, and what the optimizer is given: trainable parameters only, with and without weight decay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.damaged_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, damaged_weights, read_json
from ssgen_ds.modeling.gather import full_shape, is_first_rank

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ssgen_ds.recipe.schema import AdapterConfig

logger = logging.getLogger(__name__)


def apply_adapter(
    model: torch.nn.Module, adapter_config: AdapterConfig, adapter_path: str | None, seed: int
) -> PeftModel:
    """Wrap `model` with a trainable LoRA adapter: a new one, or the one saved at `adapter_path`.

    New weights come from `seed` alone, so they are the same on every rank; the caller's random state is left as it
    was. The adapter has the base's dtype, or is float32 where the recipe says so. Works on a model that ZeRO-3 has
    already partitioned.

    Raises:
        UserError: no such target modules (the message lists those there are), no adapter at `adapter_path`, or one of
            another base.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if adapter_path is not None:
        return _in_dtype(_load_adapter(model, adapter_path), adapter_config)
    _check_targets(model, adapter_config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter_config.rank,
        lora_alpha=adapter_config.alpha,
        lora_dropout=adapter_config.dropout,
        target_modules=_targets(model, adapter_config.target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU; torch.manual_seed would touch CUDA too
        there = ", ".join(linear_names(model))  # before peft renames some
        try:
            adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
        except ValueError as error:  # a norm, or a block of several modules
            what = " ".join(str(error).split())[:200]
            raise UserError(
                f"adapter.target_modules: peft cannot adapt all of them: {what} ...; there are {there}"
            ) from None
        return _in_dtype(adapted, adapter_config)


def _load_adapter(model: torch.nn.Module, path: str) -> PeftModel:
    from peft import PeftModel

    read_adapter_config(path)
    refuse_damaged_adapter(path)
    try:
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True, autocast_adapter_dtype=False)
        # Once more, for what it says of the tensors: `from_pretrained` only warns of those that are missing.
        found = adapted.load_adapter(path, adapted.active_adapter, is_trainable=True, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        if is_device_error(error):
            raise
        raise UserError(f"model.adapter_path: {path} does not fit {model.name_or_path}: {error}") from error
    for what, names in (("lacks", found.missing_keys), ("has no place for", found.unexpected_keys)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            whose = path if what == "lacks" else model.name_or_path
            raise UserError(
                f"model.adapter_path: {path} does not fit {model.name_or_path}: {whose} {what} {sorted(names)[0]}{more}"
            )
    return adapted


def _targets(model: torch.nn.Module, asked: str | list[str]) -> str | list[str]:
    """What peft is asked to adapt. Of a mixture of experts `all-linear` is every Linear but the head and the routers.

    peft would add the fused experts and the router, as parameters: routing is nobody's to change unasked, and ZeRO-3
    cannot compute with them.
    """
    blocks = [(name, module) for name, module in model.named_modules() if "experts" in dict(module.named_children())]
    if asked != "all-linear" or not blocks:
        return asked
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    routers = {
        name.rpartition(".")[2]
        for _, block in blocks
        for name, _ in block.named_modules()
        if name.partition(".")[0].endswith(("gate", "router"))
    }
    kept = LoraConfig(target_modules=sorted(set(linear_names(model)) - routers))
    convert_peft_config_for_transformers(kept, model, None)  # takes out the names that stand for experts in peft
    names = sorted(kept.target_modules)
    if is_first_rank():
        logger.warning(
            "adapter.target_modules=all-linear: a mixture of experts: %s are adapted; routers and experts stay as "
            "they are",
            ", ".join(names),
        )
    return names


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
        UserError: no such folder, not an adapter, no weights in it, or adapter_config.json is damaged.
    """
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"model.adapter_path: {path} is no adapter folder: it has no adapter_config.json")
    if not any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_model.bin")):
        raise UserError(f"model.adapter_path: {path} has no adapter weights (adapter_model.safetensors)")
    return read_json(folder / ADAPTER_CONFIG)


def refuse_damaged_adapter(path: str) -> None:
    """Whether its weights are as long as they say. Raises UserError."""
    if problems := damaged_weights(Path(path)):
        raise UserError.from_list(f"model.adapter_path: cannot load {path}", problems)


def linear_names(model: PreTrainedModel) -> list[str]:
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

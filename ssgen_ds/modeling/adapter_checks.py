"""Which adapters can be trained, decided without weights: modules named by hand, and adapters made elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter, linear_names, read_adapter_config

if TYPE_CHECKING:
    from ssgen_ds.recipe.schema import Recipe

# Of a LoRA adapter: what may be set to anything at every ZeRO stage.
_PLAIN = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size",
    "runtime_config",
))  # fmt: skip
# peft copies, or computes with, the base's own parameters for these: empty placeholders under ZeRO-3.
_WHOLE = frozenset((
    "modules_to_save", "bias", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters",
    "ensure_weight_tying",
))  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "", "none", [], {})  # values that ask for nothing
_INIT = (None, True, False, "gaussian", "orthogonal")
_EMBEDDINGS = frozenset(("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings"))


def adapter_problems(path: str | None, zero_stage: int) -> list[str]:
    """One sentence a problem, naming the setting and the fix; none where there is no adapter, or it can be trained.

    Raises:
        UserError: no adapter at `path`.
    """
    if path is None:
        return []
    config: dict[str, Any] = read_adapter_config(path)
    where = f"model.adapter_path: {path}"
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{where} is an adapter of the kind {kind}; only LoRA adapters can be trained here"]
    asked = {key: value for key, value in config.items() if value not in _OFF}
    problems = []
    if config.get("init_lora_weights") not in _INIT:
        problems.append(
            f"{where}: init_lora_weights={config['init_lora_weights']!r} has changed the base, too; convert it to a "
            "plain LoRA adapter first (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in sorted(asked.keys() - _PLAIN - _WHOLE - {"init_lora_weights"}):
        problems.append(f"{where}: {key}={asked[key]!r} cannot be trained here; begin with an adapter without it")
    if zero_stage == 3:
        whole = sorted(asked.keys() & _WHOLE)
        targets = asked.get("target_modules", [])
        if isinstance(targets, list) and _EMBEDDINGS.intersection(targets):
            whole.append("target_modules with an embedding")
        if whole:
            problems.append(
                f"{where}: {', '.join(whole)}: needs whole weights of the base, which ZeRO stage 3 partitions; "
                "use deepspeed=ds_configs/zero2.json"
            )
    return problems


def target_problems(recipe: Recipe, zero_stage: int) -> list[str]:
    """What is wrong with target modules that were named by hand, a sentence each; weights are not read.

    Under ZeRO-3 peft cannot compute with the weights of embeddings and routers, which are empty placeholders there.
    """
    adapter = recipe.adapter
    if adapter.kind != "lora" or adapter.target_modules == "all-linear" or recipe.model.adapter_path is not None:
        return []
    from accelerate import init_empty_weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ssgen_ds.modeling.load import load_config
    from ssgen_ds.modeling.zero3 import build_without_weights

    base = build_without_weights(load_config(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
    linear = ", ".join(linear_names(base))
    try:
        with init_empty_weights(include_buffers=False):
            adapted = apply_adapter(base, adapter, None, seed=0)
    except UserError as problem:
        return [str(problem)]
    whole = {
        name.rpartition(".")[2]
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer) and type(layer.get_base_layer()).__name__ not in ("Linear", "Conv1D")
    }
    if zero_stage < 3 or not whole:
        return []
    return [
        f"adapter.target_modules: {', '.join(sorted(whole))}: no Linear layers: an adapter needs their whole weights, "
        f"which ZeRO stage 3 partitions; use deepspeed=ds_configs/zero2.json, or some of {linear}"
    ]

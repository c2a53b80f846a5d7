"""What a model takes, from its configuration alone: it is built and run without memory, on the meta device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ssgen_ds.data.window import Layout, Sequence, collate
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.load import load_config
from ssgen_ds.modeling.loss import token_loss
from ssgen_ds.modeling.packed import attention_replaced
from ssgen_ds.recipe.schema import AdapterConfig, Recipe

_ATTENTION = "ssgen_plan"
_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Sizes:
    """Parameters are counted in elements, activations in bytes of one token; tied weights count once."""

    parameters: int  # all parameters of the base model
    trained: int  # parameters that get gradients and optimizer states
    adapter: int  # LoRA's; 0 without one
    quantizable: int  # weights that nf4 would replace: all Linear layers but the output head
    small: int  # in parameters that ZeRO-3 keeps whole on every rank
    largest_unit: int  # a decoder layer, or the embedding
    layers: int
    hidden: int
    vocabulary: int
    activations: float  # kept for the backward without checkpointing, per token, over all layers
    layer_activations: float  # the same for one layer
    widest: int  # elements of the largest single activation of a token
    cache: int  # keys and values, per token, over all layers, in bytes


def find_config(recipe: Recipe) -> tuple[PreTrainedConfig, str]:
    """The model's configuration and where it came from: a shape that is shipped, or the model itself.

    Raises:
        UserError: no such model, or a hub id that cannot be reached and is not among the shapes shipped.
    """
    folder = Path(__file__).parent / "shapes"
    shipped = folder / f"{recipe.model.path.replace('/', '--')}.json"
    if shipped.is_file() and not Path(recipe.model.path).is_dir():
        return AutoConfig.from_pretrained(shipped), f"shape shipped with ssgen ({shipped.name})"
    try:
        return load_config(recipe.model), recipe.model.path
    except UserError as error:
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in folder.glob("*.json")))
        raise UserError(f"{error}\nshapes that `plan` knows without the hub: {known}") from None


def measure(
    config: PreTrainedConfig, adapter: AdapterConfig, dtype: torch.dtype, persist_below: int, is_packed: bool
) -> Sizes:
    """Count parameters, and the bytes that autograd keeps of a forward pass.

    Args:
        dtype: that the model computes in.
        persist_below: elements; `stage3_param_persistence_threshold` of the DeepSpeed file.
        is_packed: micro batches without padding keep queries, keys and values once more.
    """
    text = config.get_text_config()
    base = _build(config, dtype, text.num_hidden_layers)
    parameters = sum(p.numel() for p in base.parameters())
    head = base.get_output_embeddings()
    linears = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    quantizable = sum(linear.weight.numel() for linear in linears)
    layers = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == text.num_hidden_layers]
    in_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers[0]] if layers else [parameters]
    largest = max(*in_layer, base.get_input_embeddings().weight.numel())
    small = sum(p.numel() for p in base.parameters() if p.numel() < persist_below)
    with init_empty_weights(include_buffers=False):
        model = base if adapter.kind == "none" else apply_adapter(base, adapter, None, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        kept = {depth: _activation_bytes(config, adapter, dtype, depth, is_packed) for depth in (1, 2)}
    except RuntimeError:  # kernels of experts that do not run without memory: Korthikanti et al., arXiv 2205.05198, 4.1
        kept = {depth: 17.0 * text.hidden_size * dtype.itemsize * depth for depth in (1, 2)}
    per_layer = kept[2] - kept[1]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads  # family traits
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        parameters=parameters,
        trained=trained,
        adapter=trained if adapter.kind == "lora" else 0,
        quantizable=quantizable,
        small=small,
        largest_unit=largest,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        activations=kept[1] + per_layer * (text.num_hidden_layers - 1),
        layer_activations=per_layer,
        widest=max(linear.weight.shape[0] for linear in linears) if linears else 4 * text.hidden_size,
        cache=2 * text.num_hidden_layers * heads * size * dtype.itemsize,
    )


def _build(config: PreTrainedConfig, dtype: torch.dtype, depth: int) -> Any:
    shallow = AutoConfig.for_model(config.model_type, **_with_depth(config.to_dict(), depth))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shallow, dtype=dtype)
    model.tie_weights()
    return model


def _with_depth(settings: dict[str, Any], depth: int) -> dict[str, Any]:
    settings = {key: value for key, value in settings.items() if key not in ("model_type", "dtype", "architectures")}
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if key in settings:
            settings[key] = depth
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:depth]
    return settings


def _activation_bytes(
    config: PreTrainedConfig, adapter: AdapterConfig, dtype: torch.dtype, depth: int, is_packed: bool
) -> float:
    """Bytes per token that a forward of the first layers keeps for its backward."""
    model = _build(config, dtype, depth)
    with init_empty_weights(include_buffers=False):
        model = model if adapter.kind == "none" else apply_adapter(model, adapter, None, seed=0)
    model.train().to("meta")
    batch = collate([Sequence([0] * _PROBE_TOKENS, [-100] * (_PROBE_TOKENS - 1) + [0])], "meta", is_packed=True)
    if not is_packed:
        batch = replace(batch, layout=_Unpacked(**vars(batch.layout)))
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with _attention_without_scores(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_loss(model, batch)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = [storage for key, storage in storages.items() if key not in parameters]
    return sum(storage.nbytes() for storage in kept) / _PROBE_TOKENS


class _Unpacked(Layout):
    """The layout of a row that is padded already: it needs no copies."""

    def to_padded(self, packed_1HND: torch.Tensor) -> torch.Tensor:
        return packed_1HND

    def to_packed(self, padded_BLHD: torch.Tensor) -> torch.Tensor:
        return padded_BLHD


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, the output and a number for each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _attention_without_scores(model: Any) -> AbstractContextManager[str]:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
        return _Attention.apply(query, key, value).transpose(1, 2), None

    return attention_replaced(model.config.get_text_config(), _ATTENTION, attend)

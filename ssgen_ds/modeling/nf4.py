"""QLoRA's frozen base: nf4 weights (Dettmers et al., arXiv 2305.14314) that train, generate and shard exactly.

transformers and bitsandbytes quantise and hold the weights; the matrix product is ours, for three reasons. In eval
mode bitsandbytes repacks weights on a CPU with bfloat16 instructions and computes in bfloat16, so that a model would
generate with other numbers than it trains with. Its backward keeps a view of the weights, so that ZeRO-3 could let
none go between forward and backward. And a generation, which calls the model hundreds of times, can dequantise once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer


def nf4_settings(double: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Codes are stored in the dtype to compute in: DeepSpeed shards by dtype, and takes floating ones only."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def dequantize(weight: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight [out, in] that codes and scales stand for, in the dtype it had before."""
    if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        # With AVX-512, bitsandbytes 0.50 takes a wrong scale where a row does not end with its block.
        flat = copy.copy(state)
        flat.shape = torch.Size([1, torch.Size(state.shape).numel()])
        return dequantize_4bit(weight, flat).view(state.shape)
    return dequantize_4bit(weight, state)


class _Matmul(torch.autograd.Function):
    """x W^T + b with W dequantised for the product, and once more for the gradient of x; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> Any:
        ctx.weight, ctx.state = weight, state  # the parameter itself, not a view: ZeRO-3 empties and refills it
        return F.linear(x, dequantize(weight, state), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ dequantize(ctx.weight, ctx.state), None, None, None


class Nf4Linear(bnb.nn.Linear4bit):
    """Same parameters as bitsandbytes' layer. `whole` is its dequantised weight while that is kept, else None."""

    whole: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.whole is not None:
            return F.linear(x, self.whole, self.bias)
        if torch.is_grad_enabled() or x.device.type == "cpu":
            return _Matmul.apply(x, self.weight, self.weight.quant_state, self.bias)
        return super().forward(x)


def nf4_layers(model: torch.nn.Module) -> list[Nf4Linear]:
    """The quantised layers; none in a model that is not quantised."""
    return [module for module in model.modules() if isinstance(module, Nf4Linear)]


def replace_linears(model: PreTrainedModel, settings: BitsAndBytesConfig) -> None:
    """Put quantised layers without weights in the place of all Linear layers but the output head."""
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    adopt(model)


def adopt(model: PreTrainedModel) -> None:
    """Have bitsandbytes' layers, as transformers makes them, multiply our way."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Nf4Linear


def quantize_and_share(
    weight: torch.Tensor | None,
    like: bnb.nn.Params4bit,
    layer: Nf4Linear,
    device: torch.device | str,
    control: dist.ProcessGroup | None,
) -> bnb.nn.Params4bit:
    """A quantised parameter on every rank: its scales are whole, its codes those of rank 0 and empty elsewhere.

    Rank 0 quantises for all, so that no two ranks' rounding can differ; ZeRO-3 broadcasts the codes itself.

    Args:
        weight: on rank 0 the weight to quantise, in the dtype to compute in; None elsewhere.
        like: the parameter without values whose place it takes.
        control: the group on which objects travel.
    """
    box: list[Any] = [None]
    if weight is not None:
        made = bnb.nn.Params4bit(
            weight.T if layer.source_cls is Conv1D else weight,
            requires_grad=False,
            compress_statistics=like.compress_statistics,
            quant_type=like.quant_type,
            quant_storage=like.quant_storage,
        ).to(device)
        # On the host: a pickled CUDA tensor would be made again on every rank's first GPU, and stay there.
        box = [(tuple(made.shape), on_host(made.quant_state.as_dict(packed=True)))]
    dist.broadcast_object_list(box, src=0, group=control)
    shape, state = box[0]
    codes = torch.empty(shape, dtype=like.quant_storage, device=device) if weight is None else made.data
    return bnb.nn.Params4bit.from_prequantized(codes, state, device=device, module=layer)


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a packed quantisation state, on the CPU."""
    return {name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()}


def dequantized_bytes(model: PreTrainedModel) -> int:
    """What `dequantized` takes."""
    return sum(torch.Size(layer.weight.quant_state.shape).numel() * model.dtype.itemsize for layer in nf4_layers(model))


@contextmanager
def dequantized(model: torch.nn.Module) -> Iterator[None]:
    """Inside, products take weights that were dequantised once: the same numbers without the work at every call."""
    layers = nf4_layers(model)
    try:
        for layer in layers:
            layer.whole = dequantize(layer.weight, layer.weight.quant_state)
        yield
    finally:
        for layer in layers:
            layer.whole = None


def dequantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain layers, whose weights are what the quantised ones multiplied with. In place."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Nf4Linear):
            continue
        weight = dequantize(layer.weight, layer.weight.quant_state)
        is_conv = layer.source_cls is Conv1D
        with torch.device("meta"):
            columns, rows = weight.shape[1], weight.shape[0]
            plain = Conv1D(rows, columns) if is_conv else torch.nn.Linear(columns, rows, bias=False)
        plain.weight = torch.nn.Parameter(weight.T.contiguous() if is_conv else weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model

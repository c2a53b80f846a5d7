"""A GPU that is not there: tensors compute on the CPU, but live on a device of their own.

Mixing them with tensors of the host raises, as on a real GPU; every operation for which the host would wait, every copy
to the device and every kernel is counted, with the line of ours or of transformers that asked for it.

Autograd works on it. Gradient checkpointing and a few families (GPT-2, Falcon) do not run on it: gaps of the pretence.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
_COPIES = {"copy_", "_to_copy"}
_VIEWS = frozenset(
    """view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided split reshape
    unfold narrow _reshape_alias empty empty_strided lift_fresh split_with_sizes unbind diagonal""".split()  # noqa: SIM905
)
_OURS = ("/ssgen_ds/", "/transformers/", "/peft/")


@dataclass
class Tally:
    """What was asked of the device, by operation and line."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    attention: Counter[tuple[bool, bool, int]] = field(default_factory=Counter)  # masked, causal, heads of the keys
    is_quiet: bool = False

    def clear(self) -> None:
        for counter in (self.waits, self.copies, self.kernels, self.attention):
            counter.clear()


TALLY = Tally()


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        TALLY.waits["tolist", _where()] += 1
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> OnDevice:
        return OnDevice(self.held.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees operations that make tensors on the device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Attention in plain operations, and tensors made of numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            TALLY.copies["torch.tensor(..., device)", _where()] += 1
            return OnDevice(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[Tally]:
    """Inside, tensors may be made on `DEVICE`, and what is asked of it is counted."""
    TALLY.clear()
    with _Dispatch(), _Functions():
        yield TALLY


def moved(model: Any, buffers: bool = True) -> Any:
    """A model's parameters on the device, ties kept, and its buffers unless they are left behind."""
    done: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in done:
                    held = OnDevice(parameter.detach())
                    done[id(parameter)] = torch.nn.Parameter(held, requires_grad=parameter.requires_grad)
                module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffers and buffer is not None:
                module._buffers[name] = OnDevice(buffer.detach())
    return model


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in _OURS):
            return f"{frame.filename.split('site-packages/')[-1].split('/ssgen_ds/')[-1]}:{frame.lineno}"
    return "?"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_device, to_host = target == DEVICE, target is not None and target.type == "cpu"
    if not there and not to_device:
        return func(*args, **kwargs)
    _refuse_mixed(name, args, tensors)
    if not TALLY.is_quiet:
        _count(name, args, bool(there), to_device, to_host)

    def held(item: Any) -> Any:
        return item.held if isinstance(item, OnDevice) else item

    plain_args, plain_kwargs = tree_map(held, args), tree_map(held, kwargs)
    if to_device:
        plain_kwargs["device"] = torch.device("cpu")
    if "pin_memory" in plain_kwargs:
        plain_kwargs["pin_memory"] = False
    if name == "histc":  # of integers; a CPU has it for floats only
        plain_args = (plain_args[0].float(), *plain_args[1:])
    out = func(*plain_args, **plain_kwargs)
    if name == "_local_scalar_dense":
        return out
    schema = func._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    if name == "copy_" or (schema.is_mutable and first is not None and first.is_write and len(schema.returns) == 1):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if to_host:
        return out
    return tree_map(
        lambda item: OnDevice(item) if isinstance(item, torch.Tensor) and not isinstance(item, OnDevice) else item, out
    )


def _refuse_mixed(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """What a real GPU refuses: tensors of the host, numbers and copies apart. It takes indices of the host."""
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    if not on_host or name in _COPIES or len(on_host) == len(tensors):
        return
    if name in _INDEXING and isinstance(args[0], OnDevice):
        values = args[2] if name.startswith("index_put") else None
        if values is None or isinstance(values, OnDevice) or values.dim() == 0:
            for _ in on_host:
                TALLY.copies[f"{name} with an index of the host", _where()] += 1
            return
    shapes = [tuple(tensor.shape) for tensor in on_host]
    raise RuntimeError(f"tensors of the host and of the device in {name} {shapes} at {_where()}")


def _count(name: str, args: Any, from_device: bool, to_device: bool, to_host: bool) -> None:
    if name in _WAITS or name == "repeat_interleave" or (to_host and from_device):
        TALLY.waits[name, _where()] += 1
    if name in _INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        TALLY.waits[f"{name} by a mask", _where()] += 1
    if name == "copy_" and isinstance(args[1], torch.Tensor):
        here, there = isinstance(args[0], OnDevice), isinstance(args[1], OnDevice)
        if there and not here:
            TALLY.waits["copy to the host", _where()] += 1
        if here and not there and args[1].dim() > 0:
            TALLY.copies["copy_", _where()] += 1
    if name == "_to_copy" and to_device and not from_device:
        TALLY.copies["to", _where()] += 1
    if name not in _VIEWS and not to_host:
        TALLY.kernels[name] += 1


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """One kernel; keys and values of fewer heads are allowed where it is told so."""
    TALLY.attention[attn_mask is not None, is_causal, key.shape[1]] += 1
    TALLY.kernels["attention"] += 1
    TALLY.is_quiet, before = True, TALLY.is_quiet
    try:
        if key.shape[1] != query.shape[1]:
            assert enable_gqa, "a kernel refuses keys of fewer heads"
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).to(value.dtype) @ value
    finally:
        TALLY.is_quiet = before

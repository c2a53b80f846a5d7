"""Whole parameters out of ZeRO-3 partitions, one at a time: no rank but the first ever holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_partitioned(parameter: torch.Tensor) -> bool:
    """True for a ZeRO-3 parameter, whose own data is an empty placeholder."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """The parameter's shape, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def is_first_rank() -> bool:
    """True on global rank 0 and outside a process group."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def gathered(parameters: list[torch.Tensor]) -> Iterator[None]:
    """Inside, these parameters are whole on every rank, for reading. A collective under ZeRO-3."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def assign(parameter: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
    """Fill a parameter with what `read` returns; a ZeRO-3 partition is filled by rank 0 alone, and is a collective."""
    if not is_partitioned(parameter):
        parameter.data.copy_(read())
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if is_first_rank():
            parameter.data.copy_(read())


def full_state_dict(module: torch.nn.Module, trainable_only: bool = False) -> dict[str, torch.Tensor] | None:
    """`module.state_dict()` with whole tensors, as CPU copies, on rank 0; None elsewhere. All ranks call it.

    Args:
        module: the model itself, not a DeepSpeed engine.
        trainable_only: leave out buffers and parameters without gradients (what an adapter needs).

    Tied names share one tensor, as in `state_dict`. Peak extra memory of the other ranks: one parameter.
    """
    keep = is_first_rank()
    copies: dict[int, Any] = {}  # tensors on rank 0, None elsewhere
    state: dict[str, Any] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if trainable_only and not tensor.requires_grad:
            continue
        if id(tensor) not in copies:
            with gathered([tensor]):
                # The other ranks keep nothing: a reference to the gathered data would keep it alive.
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if keep else None
        state[name] = copies[id(tensor)]
    return state if keep else None

"""Errors of a device or its memory: they say nothing about the model, and keep their own name wherever they strike."""

from __future__ import annotations

import re

_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # the host's allocator has no exception of its own
_DEVICE = re.compile(r"\b(CUDA|HIP|NCCL|cuDNN) error|\bCU(BLAS|DNN|SPARSE|SOLVER)(LT)?_STATUS|no kernel image", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no more memory."""
    import torch  # late: modules that name these errors are also imported where torch is not needed

    return isinstance(error, torch.OutOfMemoryError) or _HOST_MEMORY in str(error)


def is_device_error(error: BaseException) -> bool:
    """Whether a device failed or ran out of memory, whatever it was asked to compute."""
    import torch

    named = isinstance(error, torch.AcceleratorError) or is_out_of_memory(error)
    return named or (isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None)

"""The most memory that a process has held."""

from __future__ import annotations

import os

import torch

from bench.selfgen.measure import status


def on_gpu() -> bool:
    """Whether the benchmarks of this machine run on a GPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def peak_bytes() -> int:
    """Of the GPU's allocator; on a CPU resident memory."""
    return torch.cuda.max_memory_allocated() if on_gpu() else status("VmHWM") * 1024

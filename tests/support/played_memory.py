"""A GPU's memory, played over tensors of the CPU: what torch.cuda would say of their allocations."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssgen_ds.distributed import peak_memory


class PlayedMemory(TorchDispatchMode):
    """Counts the bytes of living storages; an allocation above `total` raises torch's own OutOfMemoryError."""

    def __init__(self, total: float = float("inf")) -> None:
        super().__init__()
        self.total, self.now, self.peak = total, 0, 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        if self.now + size > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self._live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)

    def allocated(self, device: Any = None) -> int:
        return self.now

    def highest(self, device: Any = None) -> int:
        return self.peak

    def reset_peak(self) -> None:
        self.peak = self.now

    @contextmanager
    def played(self) -> Iterator[PlayedMemory]:
        """Inside, torch.cuda and PeakMemory speak of this memory. One thread runs the backward, which must see it."""
        patches = [
            mock.patch("torch.cuda.synchronize"),
            mock.patch("torch.cuda.empty_cache"),
            mock.patch("torch.cuda.memory_allocated", self.allocated),
            mock.patch("torch.cuda.max_memory_allocated", self.highest),
            mock.patch("torch.cuda.reset_peak_memory_stats", self.reset_peak),
            mock.patch.object(peak_memory, "_reset", self.reset_peak),
            mock.patch.object(peak_memory, "_peak", self.highest),
        ]
        for patch in patches:
            patch.start()
        try:
            with torch.autograd.set_multithreading_enabled(False), self:
                yield self
        finally:
            for patch in patches:
                patch.stop()

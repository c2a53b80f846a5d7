"""Files of a checkpoint: they are written in one stream and hashed, checked by the hash, and read by intervals.

A shard is a safetensors file, so any tool reads it. It holds parts of flattened parameters, `KIND:NAME` each, where
KIND is `weight` (float32) or a state of the optimizer (`exp_avg`). Its metadata says where in NAME a part begins:

    fragments = {NAME: [start, [shape of the whole parameter], optimizer steps it has seen, phase]}

Moments of 8 bits are codes (`state1`) and the scale of each block of 256 (`absmax1`). Blocks are counted in the flat
buffer of the rank that wrote them; `phase` is the place of the part's first value in its block.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

WEIGHT = "weight"
SCALE = "absmax"  # kinds that begin with it hold one value a block
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit moments
_CHUNK = 16 * 2**20  # bytes written and hashed at a time
_VISIBLE_SECONDS = 10.0  # a network file system may show another node's file this late
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8"}


@dataclass(frozen=True)
class FileEntry:
    """What a file must be: its size in bytes and its SHA-256, as `sha256sum` prints it."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileEntry:
        """The entry of an existing file. Raises OSError."""
        digest, size = hashlib.sha256(), 0
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return cls(size, digest.hexdigest())

    def problem(self, file: Path) -> str:
        """What is wrong with the file; "" when it is what it must be."""
        try:
            size = file.stat().st_size
            if size != self.size:
                return f"{file}: {size} bytes instead of {self.size}" + (" (truncated)" if size < self.size else "")
            return "" if FileEntry.of(file) == self else f"{file}: its content has changed (SHA-256 differs)"
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: {error.strerror or error}"


@dataclass(frozen=True)
class ShardPart:
    """A piece of a flattened parameter with its optimizer states: 1-D tensors of equal length, scales apart."""

    name: str
    start: int
    shape: tuple[int, ...]  # shape of the whole parameter
    step: float  # optimizer steps that the parameter has seen
    tensors: dict[str, torch.Tensor]  # by kind
    phase: int = 0  # place of the first value in its block; 0 where there are no scales


@dataclass(frozen=True)
class _Piece:
    """What one shard holds of a parameter."""

    start: int
    end: int
    step: float
    phase: int
    file: Any

    def read(self, kind: str, name: str, low: int, high: int) -> torch.Tensor:
        stored = self.file.get_slice(f"{kind}:{name}")
        if not kind.startswith(SCALE):
            return stored[low:high]
        blocks = (self.phase + torch.arange(low, high)) // BLOCK
        return stored[:][blocks]


def write_shard(file: Path, parts: list[ShardPart]) -> FileEntry:
    """Write and fsync one shard; tensors leave the device one by one. Raises OSError."""
    tensors = {f"{kind}:{part.name}": tensor for part in parts for kind, tensor in part.tensors.items()}
    header: dict[str, Any] = {
        "__metadata__": {"fragments": json.dumps({p.name: [p.start, list(p.shape), p.step, p.phase] for p in parts})}
    }
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    digest, size = hashlib.sha256(), 0
    with open(file, "wb", buffering=0) as stream:
        for data in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, tensors.values())):
            view = memoryview(cast(Any, data))
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                written = 0
                while written < len(chunk):  # a raw stream may take less than it is given
                    written += stream.write(chunk[written:])
                digest.update(chunk)
                size += len(chunk)
        os.fsync(stream.fileno())
    return FileEntry(size, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy if it is contiguous and in host memory."""
    host = tensor.detach().cpu().contiguous()
    return memoryview(cast(Any, host.view(torch.uint8).numpy())) if host.numel() else memoryview(b"")


class ShardReader:
    """All shards of a checkpoint, open: any interval of any parameter, whichever rank wrote it.

    Raises OSError when a shard does not become visible or cannot be opened.
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        self._kinds: dict[str, list[str]] = {}
        self._open = ExitStack()
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not file.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        try:
            opened = self._open.enter_context(safe_open(file, framework="pt"))
            fragments = json.loads(opened.metadata()["fragments"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise OSError(f"{file}: not a shard of a checkpoint ({error})") from None
        kinds: dict[str, list[str]] = defaultdict(list)
        for key in opened.keys():  # noqa: SIM118 (it is no dictionary)
            kind, _, name = key.partition(":")
            kinds[name].append(kind)
        self._kinds |= kinds
        for name, (start, shape, step, phase) in fragments.items():
            numel = opened.get_slice(f"{WEIGHT}:{name}").get_shape()[0]
            self.shapes[name] = tuple(shape)
            self._pieces[name].append(_Piece(start, start + numel, step, phase, opened))

    def kinds(self, name: str) -> list[str]:
        """`weight` and the optimizer's states that were saved of this parameter."""
        return self._kinds[name]

    def step(self, name: str) -> float:
        """Optimizer steps that the parameter has seen."""
        return max(piece.step for piece in self._pieces[name])

    def read(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill 1-D `out` with the flattened parameter (or its state) from `start` on; scales are given to each value.

        Raises OSError for a gap.
        """
        end, missing = start + out.numel(), out.numel()
        for piece in self._pieces.get(name, []):
            low, high = max(piece.start, start), min(piece.end, end)
            if low < high:
                out[low - start : high - start].copy_(piece.read(kind, name, low - piece.start, high - piece.start))
                missing -= high - low
        if missing:
            raise OSError(f"the shards lack {missing} of {out.numel()} values of {name} ({kind})")

    def whole(self, name: str) -> torch.Tensor:
        """The float32 weight of a parameter in its shape."""
        shape = self.shapes[name]
        out = torch.empty(math.prod(shape))
        self.read(WEIGHT, name, 0, out)
        return out.view(shape)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

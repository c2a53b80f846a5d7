"""Adam's moments between an optimizer's state and a checkpoint, in float32 or in bitsandbytes' 8 bits.

In 8 bits a moment is a code and the scale of its block of 256 values. Both are kept. A resumed
run is bitwise identical where the blocks are the same; with other ranks or another ZeRO stage the values are encoded
again.
"""

from __future__ import annotations

from typing import Any

import torch

from ssgen_ds.checkpoint.shard_file import BLOCK, SCALE, WEIGHT, ShardReader
from ssgen_ds.errors import UserError

_MAPS = ("qmap1", "qmap2")  # what the codes stand for: constants, not saved


def saved_states(state: dict[str, Any], owner: torch.Tensor, offset: int, numel: int) -> dict[str, torch.Tensor]:
    """Views by kind: `numel` values from `offset` on in the flattened owner. Raises UserError for unknown states."""
    states: dict[str, torch.Tensor] = {}
    for kind, value in state.items():
        if kind == "step" or kind in _MAPS:
            continue
        if kind.startswith(SCALE):
            states[kind] = value[offset // BLOCK : (offset + numel - 1) // BLOCK + 1]
        elif torch.is_tensor(value) and value.shape == owner.shape:
            states[kind] = value.detach().view(-1)[offset : offset + numel]
        else:
            raise UserError(f"train.optimizer: its state {kind} cannot be saved in parts")
    return states


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether bitsandbytes keeps its moments."""
    return hasattr(optimizer, "name2qmap")


def load_8bit(optimizer: Any, owner: torch.Tensor, fragments: list[Any], reader: ShardReader) -> dict[str, Any]:
    """The state of one owner, as its optimizer makes it in its first step, filled from a checkpoint.

    Args:
        fragments: all that lie in this owner.
    """
    from bitsandbytes.functional import quantize_blockwise

    small = owner.numel() < optimizer.args.min_8bit_size  # these stay in float32
    state: dict[str, Any] = {"step": int(max(reader.step(fragment.name) for fragment in fragments))}
    for number, map_name in ((1, "dynamic"), (2, "udynamic")):
        kind, scale_kind = f"state{number}", f"{SCALE}{number}"
        code_map = optimizer.name2qmap[map_name].to(owner.device)
        values, codes, scales = _read(owner, fragments, reader, kind, scale_kind, code_map)
        state[kind] = optimizer.get_state_buffer(owner, torch.float32 if small else torch.uint8)
        if small:
            state[kind].copy_(values.view(owner.shape))
            continue
        if codes is None:
            codes, quantized = quantize_blockwise(values, code=code_map, blocksize=BLOCK)
            scales = quantized.absmax
        state[kind].copy_(codes.view(owner.shape))
        state[f"qmap{number}"], state[scale_kind] = code_map, scales
    return state


def _read(
    owner: torch.Tensor, fragments: list[Any], reader: ShardReader, kind: str, scale_kind: str, code_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Values [numel] in float32; codes [numel] and scales [blocks] where blocks are what they were, else None."""
    numel, device = owner.numel(), owner.device
    zero = int(code_map.abs().argmin())
    codes = torch.full((numel,), zero, dtype=torch.uint8, device=device)  # what no fragment covers is padding
    scales = torch.full((numel,), torch.nan, device=device)
    values = torch.zeros(numel, device=device)
    same_blocks = True
    for fragment in fragments:
        place = slice(fragment.offset, fragment.offset + fragment.numel)
        if scale_kind in reader.kinds(fragment.name):
            reader.read(kind, fragment.name, fragment.start, codes[place])
            reader.read(scale_kind, fragment.name, fragment.start, scales[place])
            values[place] = code_map[codes[place].long()] * scales[place]
        elif kind in reader.kinds(fragment.name):
            reader.read(kind, fragment.name, fragment.start, values[place])
            same_blocks = False
    blocks = -(-numel // BLOCK)
    padded = torch.full((blocks * BLOCK,), torch.nan, device=device)
    padded[:numel] = scales
    by_block = padded.view(blocks, BLOCK)
    highest = by_block.nan_to_num(nan=-1.0).amax(1)
    if not same_blocks or not (by_block.isnan() | (by_block == highest[:, None])).all():
        return values, None, None
    return values, codes, highest.clamp(min=0.0)


def load_float(state: dict[str, Any], owner: torch.Tensor, fragment: Any, reader: ShardReader) -> None:
    """One fragment's moments into the state of AdamW in float32."""
    for kind in reader.kinds(fragment.name):
        if kind != WEIGHT:
            target = state.setdefault(kind, torch.zeros_like(owner, memory_format=torch.preserve_format))
            reader.read(kind, fragment.name, fragment.start, fragment.of(target))

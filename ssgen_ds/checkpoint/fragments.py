"""Which parts of the trained weights, and of their optimizer states, this rank holds; the same view of ZeRO 0 to 3.

DeepSpeed keeps float32 weights and Adam's moments in flat buffers that each rank owns a part of. A *fragment* is the
overlap of one parameter with this rank's part. Checkpoints are written and read by fragments, so that they do not
depend on the number of ranks or on the ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ssgen_ds.checkpoint.moments import is_8bit, load_8bit, load_float, saved_states
from ssgen_ds.checkpoint.shard_file import BLOCK, WEIGHT, ShardPart, ShardReader
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.gather import full_shape


@dataclass(frozen=True)
class Fragment:
    """The interval [start, start + numel) of a flattened parameter, and where its float32 weights lie."""

    name: str
    shape: tuple[int, ...]  # shape of the whole parameter
    start: int
    numel: int
    owner: torch.Tensor  # the tensor that the optimizer knows: it is the key of its state
    offset: int  # where the fragment begins in the flattened owner

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's part of the owner or of a state shaped like it: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]

    def share(self, rank: int, size: int) -> Fragment:
        """The part of a fragment that every rank holds which this one writes."""
        low, high = rank * self.numel // size, (rank + 1) * self.numel // size
        return Fragment(self.name, self.shape, self.start + low, high - low, self.owner, self.offset + low)


class Fragments:
    """The fragments of one DeepSpeed engine. Raises UserError for states on NVMe, which are not in memory."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.is_replicated = self.stage == 0
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.shapes = {name: tuple(full_shape(p)) for name, p in trained}
        if getattr(self.optimizer, "swap_optimizer", False) or getattr(self.optimizer, "params_in_nvme_and_cpu", False):
            raise UserError("deepspeed: states offloaded to nvme cannot be saved; offload them to cpu")
        find = {0: self._replicated, 1: self._flat, 2: self._flat, 3: self._partitioned}[self.stage]
        self.mine = list(find(trained))

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The optimizer's own, by owner."""
        return self._inner.state

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps. Without ZeRO there may be no wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's shard with Adam's two moments; of all weights where every rank holds them."""
        return sum(3 * 4 * fragment.numel for fragment in self.mine)

    def parts(self, rank: int, size: int) -> list[ShardPart]:
        """What this rank writes; together the ranks write everything once."""
        mine = [f.share(rank, size) for f in self.mine] if self.is_replicated else self.mine
        return [self._part(fragment) for fragment in mine if fragment.numel]

    def _part(self, fragment: Fragment) -> ShardPart:
        state = self.state.get(fragment.owner, {})
        moments = saved_states(state, fragment.owner, fragment.offset, fragment.numel)
        tensors = {WEIGHT: fragment.of(fragment.owner)} | moments
        steps, phase = float(state.get("step", 0)), fragment.offset % BLOCK
        return ShardPart(fragment.name, fragment.start, fragment.shape, steps, tensors, phase)

    def load(self, reader: ShardReader) -> None:
        """Fill this rank's fragments; `publish` then brings them into the model. No collectives. Raises UserError."""
        if missing := sorted(set(self.names) - reader.shapes.keys()):
            raise UserError(f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        if other := sorted(reader.shapes.keys() - set(self.names)):
            raise UserError(f"it holds {other[0]}, which this run does not train")
        for name in self.names:
            if reader.shapes[name] != self.shapes[name]:
                raise UserError(f"{name} has the shape {reader.shapes[name]} there, {self.shapes[name]} here")
        by_owner: dict[torch.Tensor, list[Fragment]] = {}
        for fragment in self.mine:
            reader.read(WEIGHT, fragment.name, fragment.start, fragment.of(fragment.owner))
            if reader.step(fragment.name) > 0:
                by_owner.setdefault(fragment.owner, []).append(fragment)
        for owner, fragments in by_owner.items():
            if is_8bit(self._inner):
                self.state[owner] = load_8bit(self._inner, owner, fragments, reader)
                continue
            for fragment in fragments:
                load_float(self._state_of(owner, reader.step(fragment.name)), owner, fragment, reader)

    def _state_of(self, owner: torch.Tensor, step: float) -> dict[str, Any]:
        """The owner's state, made as its optimizer makes it in its first step."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        state = self.state.setdefault(owner, {})
        counts = isinstance(self._inner, DeepSpeedCPUAdam)
        state["step"] = max(int(step), state.get("step", 0)) if counts else torch.tensor(step, device=owner.device)
        return state

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the model that computes. A collective."""
        optimizer = self.optimizer
        if self.stage == 3:
            persistent = optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent:
                persistent[0].all_gather(persistent)
        elif self.stage in (1, 2):
            optimizer.update_lp_params()
        else:
            for parameter, master in self._masters():
                if parameter is not master:
                    parameter.copy_(master)

    # -- where each stage keeps its float32 weights --------------------------------------------------------------------

    def _masters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """ZeRO 0: each trained parameter with its float32 copy, or with itself."""
        if hasattr(self.optimizer, "fp32_groups"):  # bfloat16
            for halves, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                yield from zip(halves, masters, strict=True)
        else:
            for group in self.optimizer.param_groups:
                yield from ((parameter, parameter) for parameter in group["params"])

    def _replicated(self, trained: list[tuple[str, Any]]) -> Iterator[Fragment]:
        masters = {id(parameter): master for parameter, master in self._masters()}
        for name, parameter in trained:
            yield Fragment(name, tuple(parameter.shape), 0, parameter.numel(), masters[id(parameter)], 0)

    def _flat(self, trained: list[tuple[str, Any]]) -> Iterator[Fragment]:
        """ZeRO 1 and 2: one flat buffer a parameter group, cut into equal parts for the ranks."""
        optimizer = self.optimizer
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
        flats = optimizer.fp32_groups_flat_partition if flats is None else flats  # DeepSpeed's BF16_Optimizer
        for name, parameter in trained:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                owner = flats[mapping.param_group_index]
                yield Fragment(name, tuple(parameter.shape), there.start, there.numel, owner, here.start)

    def _partitioned(self, trained: list[tuple[str, Any]]) -> Iterator[Fragment]:
        """ZeRO 3: every parameter is cut into equal parts, the last one padded."""
        import torch.distributed as dist

        for name, parameter in trained:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            part = parameter.ds_tensor.ds_numel
            start = dist.get_rank(parameter.ds_process_group) * part
            numel = min(part, math.prod(parameter.ds_shape) - start)
            if numel > 0:
                owner = self.optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(name, tuple(parameter.ds_shape), start, numel, owner, offset)

"""Inference on ZeRO-3 partitions without the hooks of training: unit by unit, or gathered once.

DeepSpeed fetches parameters module by module and records the order of the modules in a trace; a generation in between
spoils the trace, and every Linear layer is a collective of its own. Here DeepSpeed's hooks are set aside for as long as
the model generates and put back as they were, so training never learns that there was a generation. A *unit* is a
decoder layer, or any other module that owns parameters (embedding, final norm, projection).

    sharded    each forward gathers a unit, uses it and lets it go; the next unit is on its way meanwhile. Memory: two
               units, and a tied embedding. Every forward is a collective: all ranks must make the same number.
    gathered   all units are gathered once, one at a time. Memory: the model. Forwards are no collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ZeroParameter = Any  # a torch.nn.Parameter with the attributes that DeepSpeed adds: ds_numel, ds_shape, ds_tensor, ...


@dataclass(eq=False)
class Unit:
    """Parameters that are needed, gathered and released together."""

    module: torch.nn.Module
    parameters: list[ZeroParameter]
    waits: list[Any] | None = None  # handles of a gather under way; None: none was started


class Shards:
    """The partitioned parameters of a model, for inference.

    Args:
        module: the model that DeepSpeed's ZeRO-3 has partitioned (`engine.module`).
        offload: what holds DeepSpeed's hooks (`engine.optimizer.parameter_offload`); None without an engine.
    """

    def __init__(self, module: PreTrainedModel, offload: Any | None):
        self.module = module
        self._offload = offload
        self._units = _units(module)
        uses: dict[int, int] = {}
        for unit in self._units:
            for parameter in unit.parameters:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        self._shared = {key for key, count in uses.items() if count > 1}  # tied: kept to the end of a forward
        self._order: list[Unit] = []  # in which a forward uses them; recorded by the first one
        self._held: list[ZeroParameter] = []  # gathered here, to be released here

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters when they are whole."""
        distinct = {id(p): p for unit in self._units for p in unit.parameters}
        return sum(p.ds_numel * p.element_size() for p in distinct.values())

    @property
    def largest_unit_bytes(self) -> int:
        return max(sum(p.ds_numel * p.element_size() for p in unit.parameters) for unit in self._units)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all parameters are whole and forwards are no collectives. All ranks enter together."""
        with self._hooks_aside():
            try:
                for unit in self._units:
                    self._start(unit)
                    self._finish(unit)
                yield
            finally:
                self._release(self._held)

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Inside, a forward gathers unit by unit. All ranks enter together and make the same number of forwards; one
        that has nothing to compute calls `take_part` instead."""
        handles = []
        with self._hooks_aside():
            try:
                for unit in self._units:
                    handles.append(unit.module.register_forward_pre_hook(self._before(unit)))
                    handles.append(unit.module.register_forward_hook(self._after(unit), always_call=True))
                handles.append(self.module.register_forward_hook(self._at_end, always_call=True))
                if not self._order:
                    self._record()
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self._at_end()

    def take_part(self) -> None:
        """The collectives of one forward, without computing it."""
        for unit in self._order:
            self._start(unit)
            self._finish(unit)
            self._let_go(unit)
        self._at_end()

    def _record(self) -> None:
        """Learn the order of the units from one token, on every rank: `take_part` cannot learn it from a forward."""
        order: list[Unit] = []
        handles = [
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: order.append(unit)) for unit in self._units
        ]
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.module.device)
            self.module(input_ids=token, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._order = order

    def _before(self, unit: Unit) -> Any:
        def hook(*_: Any) -> None:
            self._start(unit)
            following = self._following(unit)
            self._finish(unit)
            if following is not None:
                self._start(following)

        return hook

    def _following(self, unit: Unit) -> Unit | None:
        if unit not in self._order:
            if self._order:
                raise RuntimeError(f"{type(unit.module).__name__} did not run in the model's first forward")
            return None
        place = self._order.index(unit) + 1
        return self._order[place] if place < len(self._order) else None

    def _after(self, unit: Unit) -> Any:
        return lambda *_: self._let_go(unit)

    def _at_end(self, *_: Any) -> None:
        """After a forward, also one that failed: nothing stays gathered, nothing is under way."""
        for unit in self._units:
            if unit.waits is not None:
                self._finish(unit)
        self._release(self._held)

    def _start(self, unit: Unit) -> None:
        if unit.waits is not None:
            return
        missing = [p for p in unit.parameters if p.ds_status.name == "NOT_AVAILABLE"]
        unit.waits = [_gather(p) for p in missing] if all(map(_is_plain, missing)) else _gather_coalesced(missing)
        self._held += missing

    def _finish(self, unit: Unit) -> None:
        for wait in unit.waits or []:
            wait()
        unit.waits = None

    def _let_go(self, unit: Unit) -> None:
        mine = {id(p) for p in unit.parameters} - self._shared
        self._release([p for p in self._held if id(p) in mine])

    def _release(self, parameters: list[ZeroParameter]) -> None:
        gone = {id(p) for p in parameters}
        for parameter in parameters:
            parameter.partition()
        self._held = [p for p in self._held if id(p) not in gone]

    @contextmanager
    def _hooks_aside(self) -> Iterator[None]:
        """DeepSpeed's forward and backward hooks out of the modules, and back in their places afterwards."""
        if self._offload is None:
            yield
            return
        handles = [*self._offload.forward_hooks, *self._offload.backward_hooks, self._offload.fwd_pre_hook]
        places = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
        ids = {handle.id for handle in handles}
        whole = {key: list(hooks.items()) for key, hooks in places.items()}
        for key, hooks in places.items():
            for number, _ in whole[key]:
                if number in ids:
                    del hooks[number]
        try:
            yield
        finally:
            for key, hooks in places.items():
                hooks.clear()
                hooks.update(whole[key])


def _num_elements(module: torch.nn.Module) -> int:
    parameters: list[ZeroParameter] = list(module.parameters())
    return sum(parameter.ds_numel for parameter in parameters)


def _units(module: torch.nn.Module) -> list[Unit]:
    """Decoder layers (the children of the longest module list that owns parameters) and what lies outside of them."""
    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    # The outermost list with the most parameters: experts lie in lists, too, but inside a layer.
    layers = max(lists, key=_num_elements, default=None)
    units = [] if layers is None else [Unit(layer, list(layer.parameters())) for layer in layers]
    inside = {id(m) for unit in units for m in unit.module.modules()}
    for other in module.modules():
        direct = list(other.parameters(recurse=False))
        if direct and id(other) not in inside:
            units.append(Unit(other, direct))
    return [unit for unit in units if unit.parameters]


def _is_plain(parameter: ZeroParameter) -> bool:
    """A shard in CPU memory, as it is in the model: gloo can gather it straight into the whole parameter.

    Quantised, secondary (hpZ) or NVMe shards, and accelerators, where one launch for many parameters counts, are
    DeepSpeed's own business.
    """
    shard = parameter.ds_tensor
    return (
        parameter.device.type == "cpu"
        and shard.device.type == "cpu"
        and parameter.ds_secondary_tensor is None
        and not hasattr(shard, "ds_quant_scale")
        and parameter.nvme_swapper is None
    )


def _gather(parameter: ZeroParameter) -> Any:
    """Start one all-gather without a copy; the wait makes the parameter whole."""
    shard, group = parameter.ds_tensor, parameter.ds_process_group
    status = type(parameter.ds_status)
    flat = torch.empty(shard.numel() * dist.get_world_size(group), dtype=shard.dtype, device=shard.device)
    work = dist.all_gather_into_tensor(flat, shard.detach().contiguous(), group=group, async_op=True)
    parameter.ds_status = status.INFLIGHT

    def wait() -> None:
        work.wait()
        parameter.data = flat[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = status.AVAILABLE

    return wait


def _gather_coalesced(parameters: list[ZeroParameter]) -> list[Any]:
    return [parameters[0].all_gather_coalesced(parameters).wait]

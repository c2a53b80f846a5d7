"""`train.micro_batch: auto`: how many of the longest sequences fit into one forward and backward pass.

On a GPU real passes find the number. The first is not measured: it pays for what is allocated once. Half a sequence
and a whole one follow, and then twice as many each time, while the last measurement says that they fit. The last pass
that fitted has the size that training will have. On a CPU, where a peak cannot be read that finely, half a sequence and
a whole one decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.distributed.device_errors import is_out_of_memory
from ssgen_ds.distributed.host_memory import GIB, free_bytes
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.sampler.build import optimizer_bytes_to_come
from ssgen_ds.training.step import train_step

_USABLE = 0.85  # of the free memory: allocators round up, and lengths differ
_STEP_DOWN = 0.75  # of the number that turned out not to fit


@dataclass(frozen=True)
class Measured:
    """What `auto` chose for a run, and the measurement that it chose by."""

    sequences: int
    one: float  # bytes of the longest sequence
    each: float  # bytes of each more
    setup: dict[str, Any]  # in which they were measured

    def fitting(self, free: float) -> int:
        """Sequences that fit with room to spare."""
        return 1 + int(max(0.0, _USABLE * free - self.one) // self.each)

    def need(self, free: float, longest: int) -> str:
        """For messages."""
        return (
            f"a sequence of {longest} tokens takes {self.one / GIB:.2f} GiB, each more {self.each / GIB:.2f}; "
            f"{free / GIB:.2f} are free"
        )

    @property
    def bytes_needed(self) -> float:
        return self.one + (self.sequences - 1) * self.each


def choose_packing(
    engine: Any,
    recipe: Recipe,
    longest: int,
    world: World,
    say: Callable[[str], None],
    kept: dict[str, Any] | None = None,
) -> tuple[Packing, dict[str, Any] | None]:
    """How the recipe's micro batches are cut, and what a checkpoint keeps of it; the same on all ranks.

    `auto` is measured when a run begins. A run that is resumed takes the number that it began with, because another
    number would round other sums. It takes a smaller one only where that number does not fit any more, and says so.

    Args:
        longest: tokens of the longest sequence that training may see.
        kept: from the checkpoint that the run is resumed from; None: there is none, or it knows of no choice.

    Raises:
        UserError: not even one sequence fits.
    """
    train, is_packed = recipe.train, recipe.data.packing
    if train.micro_batch != "auto":
        return Packing(int(train.micro_batch), train.micro_batch_tokens, is_packed), None
    setup = {
        "ranks": world.size,
        "longest": longest,
        "packing": is_packed,
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "device": world.device.type,
    }
    free = -world.max(-free_bytes(world)) - world.max(optimizer_bytes_to_come(engine, world))
    if kept is not None and kept["setup"] == setup:
        measured = Measured(**kept)
        _refuse_none(measured, free, longest)
        chosen, why = _chosen_before(measured, free, longest)
    else:
        trial = Trial(engine, longest, is_packed, world)
        measured = trial.measure(-(-train.global_batch // world.size), free, setup)
        chosen, why = measured.sequences, measured.need(free, longest)
    if world.is_main:
        say(f"train.micro_batch auto: {chosen}: {why}")
    return Packing(chosen, train.micro_batch_tokens, is_packed), asdict(measured)


def _refuse_none(measured: Measured, free: float, longest: int) -> None:
    if measured.one > free:
        raise UserError(
            f"train.micro_batch: not even one fits: {measured.need(free, longest)}; set "
            "model.gradient_checkpointing=true, lower data.max_prompt_tokens, or see `ssgen plan`"
        )


def _chosen_before(measured: Measured, free: float, longest: int) -> tuple[int, str]:
    """The number that a resumed run takes, and why."""
    if measured.bytes_needed <= free:
        return measured.sequences, "as when the run began"
    began = f"the run began with {measured.sequences}, for which there is no room now"
    chosen = min(measured.sequences, measured.fitting(free))
    return chosen, f"{began}; sums are rounded in another order from here on: {measured.need(free, longest)}"


@dataclass(frozen=True)
class Trial:
    """Passes of sequences of one length, which leave nothing behind. All ranks make the same ones."""

    engine: Any
    longest: int  # tokens
    is_packed: bool
    world: World

    def measure(self, most: int, free: float, setup: dict[str, Any]) -> Measured:
        """The largest number up to `most` for which there is room. Raises UserError where there is none."""
        half_length = max(2, self.longest // 2)
        if self.measures_peaks:
            self.bytes_of(1, half_length)  # what is allocated once is not a sequence's
        half = self.bytes_of(1, half_length) if most > 1 else 0.0
        one = self.bytes_of(1, self.longest)
        measured = Measured(1, one, max(2 * (one - half), 1.0), setup)
        _refuse_none(measured, free, self.longest)
        most = min(most, measured.fitting(free))
        if not self.measures_peaks:
            return replace(measured, sequences=most)
        return self._grow(measured, most, free)

    def _grow(self, measured: Measured, most: int, free: float) -> Measured:
        """Try twice as many until `most`, or until a measurement says that more would not fit."""
        while measured.sequences < most:
            number = min(2 * measured.sequences, most)
            expected = measured.one + (number - 1) * measured.each
            if not self._has_room(expected):
                most = max(measured.sequences, int(_STEP_DOWN * number))
                continue
            needed = self.bytes_of(number, self.longest)
            each = max((needed - measured.one) / (number - 1), 1.0)
            measured = replace(measured, each=each)
            if needed > _USABLE * free:
                most = max(measured.sequences, min(int(_STEP_DOWN * number), measured.fitting(free)))
                continue
            measured = replace(measured, sequences=number)
            most = min(most, measured.fitting(free))
        return measured

    @property
    def measures_peaks(self) -> bool:
        return self.world.device.type == "cuda"

    def bytes_of(self, number: int, length: int) -> float:
        """What a forward and backward of so many sequences on each rank needs, on the rank that needs most.

        The weight of their labels is NaN, so that the update is left out like any that is not finite: the weights and
        the optimizer stay as they are.
        """
        # Every second token has a label: more than most data has, where the prompt has none.
        labels = [-100 if i % 2 == 0 else 3 for i in range(length)]
        sequences = [Sequence([3] * length, labels, weight=math.nan)] * (number * self.world.size)
        packing, world = Packing(number, None, self.is_packed), self.world
        window = build_window(sequences, packing, world.rank, world.size, world.device)
        was_training = self.engine.training
        self.engine.train()
        needed = self._measured(lambda: train_step(self.engine, window, 0.0, world))
        self.engine.train(was_training)
        return world.max(needed)

    def _measured(self, run: Callable[[], object]) -> float:
        if not self.measures_peaks:
            return _saved_bytes(run)
        # The step resets torch's peak in each of its phases, and notes it: the highest of them is the step's.
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        self.world.memory.take()
        run()
        torch.cuda.synchronize()
        return float(max(self.world.memory.take().values()) - before)

    def _has_room(self, size: float) -> bool:
        """Whether each rank can allocate so many bytes now: what others on the GPU take is not known otherwise."""
        try:
            torch.empty(int(size), dtype=torch.uint8, device=self.world.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return not self.world.any(True)
        return not self.world.any(False)


def _saved_bytes(run: Callable[[], object]) -> float:
    """On a CPU, whose peak cannot be read that finely: what autograd keeps for the backward, and a third more."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values()) * 4 / 3

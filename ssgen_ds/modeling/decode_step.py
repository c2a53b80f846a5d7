"""One token a row again and again, replayed from a CUDA graph.

Such a call starts some 1500 kernels for 32 layers, 2400 with LoRA: the host needs longer to start them than the GPU to
run them. A graph starts them all at once. Its tensors stay in their places: tokens and positions come into one buffer,
keys are read up to a rounded length behind a mask, and a row without a token feeds one to a slot that nobody reads.

A graph is recorded once a length has come often enough, and is used only when its logits are those of the plain call.
This has not been run on a GPU yet: `selfgen.cuda_graph` is off unless it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from ssgen_ds.distributed.device_errors import is_out_of_memory
from ssgen_ds.modeling.call_layout import CallLayout, GroupLayout, GroupPlaces, Masks, on_device
from ssgen_ds.modeling.pieces import Group, Piece

log = logging.getLogger(__name__)

# Records what is given; a function that does it again, and the tensor that then holds the result.
Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]

_KEYS = 256  # lengths are rounded up to a multiple of it: each has a graph of its own
_OFTEN = 8  # plain calls of a length before its graph is worth recording
_SAME = {torch.float32: 1e-4}  # of the norm of the logits
_SAME_ROUNDED = 2e-2


def record_cuda(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of the work."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


@cache
def _warn(why: str) -> None:
    """Once for each reason."""
    log.warning("selfgen.cuda_graph: decoding goes on without a graph: %s", why)


class DecodeStep:
    """Calls that feed at most one token to each row of a batch.

    Args:
        run: makes a call of a layout; logits [W, V].
        masks: of the model.
    """

    def __init__(
        self, run: Callable[[CallLayout], torch.Tensor], masks: Masks, device: torch.device, record: Record
    ) -> None:
        self._run, self._masks, self._device, self._record = run, masks, device, record
        self._is_off = False

    def open(self, rows: int, capacity: int) -> None:
        """Forget all graphs: the keys and values of the batch lie elsewhere now.

        Args:
            rows: of the batch.
            capacity: slots of a row. The last one is nobody's.
        """
        self._rows, self._capacity = rows, capacity
        self._ids_2B = torch.zeros(2, rows, dtype=torch.long, device=self._device)  # tokens, slots
        self._all_B = torch.arange(rows, device=self._device)
        self._seen: dict[int, int] = {}
        self._graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}

    def __call__(self, pieces: list[Piece]) -> torch.Tensor | None:
        """Logits [W, V] as of the plain call, or None where that is to be made."""
        if self._is_off or not all(len(piece.tokens) == 1 and piece.begin > 0 for piece in pieces):
            return None
        keys = min(-(-max(piece.end for piece in pieces) // _KEYS) * _KEYS, self._capacity)
        self._seen[keys] = self._seen.get(keys, 0) + 1
        if self._seen[keys] <= _OFTEN:
            return None
        self._fill(pieces)
        if keys not in self._graphs:
            graph = self._recorded(keys)
            if graph is None:
                return None
            self._graphs[keys] = graph
        replay, logits_BV = self._graphs[keys]
        replay()
        wanted = [piece.row for piece in pieces if piece.wanted]
        # A copy: the next replay writes where this one has.
        return logits_BV[on_device([wanted], self._device)[0]]

    def _fill(self, pieces: list[Piece]) -> None:
        tokens, slots = [0] * self._rows, [self._capacity - 1] * self._rows
        for piece in pieces:
            tokens[piece.row], slots[piece.row] = piece.tokens[0], piece.begin
        new_2B = torch.tensor([tokens, slots])
        if self._device.type == "cuda":
            new_2B = new_2B.pin_memory()
        self._ids_2B.copy_(new_2B, non_blocking=True)

    def _recorded(self, keys: int) -> tuple[Callable[[], None], torch.Tensor] | None:
        """A graph that gives what the plain call gives; None, and no more of them, where there is none."""
        expected_BV = self._run(self._layout(keys)).clone()
        try:
            replay, logits_BV = self._record(lambda: self._run(self._layout(keys)))
            replay()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._give_up(str(error).strip().splitlines()[0])
            return None
        off = ((logits_BV.float() - expected_BV.float()).norm() / expected_BV.float().norm()).item()
        if not off < _SAME.get(expected_BV.dtype, _SAME_ROUNDED):
            self._give_up(f"its logits are off by {off:.1e}")
            return None
        return replay, logits_BV

    def _give_up(self, why: str) -> None:
        self._is_off = True
        _warn(why)

    def _layout(self, keys: int) -> CallLayout:
        """Of a call in which every row feeds the token in the buffer."""
        tokens_B, slots_B = self._ids_2B
        group = Group("rows", tuple(range(self._rows)), None, 1)
        places = GroupPlaces(group, self._rows, keys, self._rows, ([], [], []))
        nothing = self._all_B[:0]
        layout = GroupLayout(places, 0, self._masks, nothing, nothing, slots_B)
        return CallLayout(tokens_B, slots_B, self._all_B, self._all_B, keys, [layout], [])

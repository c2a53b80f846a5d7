"""What a model call costs: measured on this model, device and strategy, on as many rows as will be in work."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.draw import draw_tokens
from ssgen_ds.sampler.engine import EngineSampler
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.requests import Request

_WIDTHS = (1, 4, 16, 32, 64, 128, 256)  # tokens a row of the calls that are measured
_ALWAYS = 32  # the width up to which they are measured; wider ones while tokens still become cheaper by them
_CHEAPER = 0.9


@dataclass(frozen=True)
class CallCost:
    """Seconds of one call on the slowest rank: linear between measured numbers of fed tokens, plus the draws."""

    fed: tuple[int, ...]  # tokens fed, ascending
    seconds: tuple[float, ...]
    per_draw: float  # projection, noise and argmax at one position
    most: int = 2**31  # tokens that one call may feed; what is more goes on in another

    def of(self, fed: int, draws: int) -> float:
        """Seconds of a pass that feeds `fed` tokens and draws at `draws` of them."""
        whole, rest = divmod(fed, self.most)
        calls = whole * self._call(self.most) + (self._call(rest) if rest or not whole else 0.0)
        return calls + draws * self.per_draw

    def _call(self, fed: int) -> float:
        right = next((i for i, known in enumerate(self.fed) if known >= fed), len(self.fed) - 1)
        right = max(right, 1)
        (x0, x1), (y0, y1) = self.fed[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return max(y0 + (y1 - y0) * (fed - x0) / (x1 - x0), 0.0)


def measure_call_cost(sampler: EngineSampler, vocab_size: int, requests: list[Request]) -> CallCost:
    """Time calls of several widths, the same on every rank; the sampler must be `ready`. Best of two, worst rank.

    As many rows as will be in work, each with what it remembers in the middle of the work.

    Args:
        requests: what will be sampled, the same on every rank.
    """
    device, limit = sampler.world.device, sampler.limit
    lengths = [(len(request.prompt_ids), len(request.coins)) for request in requests]
    longest = max(prompt + response for prompt, response in lengths)
    middle = sum(2 * prompt + response for prompt, response in lengths) // (2 * len(lengths))
    rows = max(1, min(limit.rows_of(longest), limit.call.tokens // min(_ALWAYS, longest)))
    widths = [width for width in _WIDTHS if width <= longest]
    widths += [longest] if len(widths) < 2 else []  # a line needs two points
    model = sampler.model()

    def seconds(width: int, drawn: int) -> float:
        tokens = [token % vocab_size for token in range(width)]
        # Nothing was fed before them: what the memory holds makes no difference to the time.
        begin = min(middle, longest - width)
        pieces = [Piece(row, begin, tokens, range(width - drawn, width)) for row in range(rows)]
        model.open(rows, longest)
        _wait_for(device)
        start = time.perf_counter()
        logits_NV = model(pieces)
        _wait_for(device)
        between = time.perf_counter()
        if drawn > 1:
            count = len(logits_NV)
            draw_tokens(logits_NV, [1] * count, [*range(count)], Sampling(), [True] * count, [None] * count)
            between = time.perf_counter()
        return between - start

    def best(width: int, drawn: int = 1) -> float:
        return sampler.world.max(min(seconds(width, drawn) for _ in range(2)))

    best(1)
    calls: list[float] = []
    for i, width in enumerate(widths):
        if width > _ALWAYS:
            before, last = (calls[j] / widths[j] for j in (i - 2, i - 1))
            if rows * width > limit.call.tokens or last > _CHEAPER * before:
                break
        calls.append(max(best(width), *calls[-1:], 0.0))  # a wider call is never cheaper: that is noise
    widths = widths[: len(calls)]
    drawn = min(widths[len(widths) // 2], limit.call.logits // rows)
    per_draw = 0.0
    if drawn > 1:
        per_draw = max(0.0, best(drawn, drawn) - best(drawn)) / (rows * (drawn - 1))
    return CallCost(tuple(rows * width for width in widths), tuple(calls), per_draw, limit.call.tokens)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

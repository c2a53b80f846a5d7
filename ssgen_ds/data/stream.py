"""Data too large to prepare: read while training, in bounded memory, in an order that (seed, step) decides.

What needs the whole data set is not possible here: bad rows surface when they are read, contents of one id are not
compared, rows count as repeated when they lie close enough together (`repeats.STREAM_WINDOW`), a split is refused by
the recipe, and going to a later step means reading up to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, islice

from ssgen_ds.data.parts import Encoder
from ssgen_ds.data.plan import Item, Purpose, bit_generator
from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.repeats import RepeatCounter, repeat_id
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

logger = logging.getLogger(__name__)
BUFFER_EXAMPLES = 4096  # over all sources: how far an example can move forward in the order
WORD = 2.0**64


class StreamPlan:
    """`StepPlan`'s interface over endless passes through the sources, chosen in proportion to their weights.

    Every pass of a source visits each of its examples once, in shuffled order (a buffer); `visit` and `epoch` of an
    item are the number of its source's pass. Steps are cheap in order; a later one is read up to, an earlier one means
    starting over.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        data: DataConfig,
        chat: ChatFormat,
        seed: int,
        global_batch: int,
        buffer_examples: int = BUFFER_EXAMPLES,
        key: str = "data.train",
    ) -> None:
        self.sources = sources
        self.seed = seed
        self.global_batch = global_batch
        self._buffer = max(1, buffer_examples // len(sources))
        self._open: Callable[[SourceConfig], Iterator[Example]] = lambda source: _examples(source, data, chat, key)
        self._next_step = 1
        self._items = self._stream()
        self._last: tuple[int, list[Item]] | None = None

    def batch(self, step: int) -> list[Item]:
        """The `global_batch` examples of one step (from 1). Raises UserError at a bad row, unless rows are skipped."""
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        if step < self._next_step:
            self._next_step, self._items = 1, self._stream()
        for _ in islice(self._items, (step - self._next_step) * self.global_batch):
            pass
        items = list(islice(self._items, self.global_batch))
        self._next_step, self._last = step + 1, (step, items)
        return items

    def epoch(self, step: int) -> int:
        """The pass that the first example of a step belongs to."""
        return self.batch(step)[0].epoch

    def _stream(self) -> Iterator[Item]:
        total = sum(source.weight for source in self.sources)
        bounds = list(accumulate(source.weight / total for source in self.sources))
        counter = RepeatCounter()  # one for all sources, because a row may be in two
        passes = [self._passes(number, counter) for number in range(len(self.sources))]
        words = bit_generator(self.seed, Purpose.STREAM_SOURCE)
        index = 0
        while True:
            draw = int(words.random_raw()) / WORD
            number = next((n for n, bound in enumerate(bounds) if draw < bound), len(bounds) - 1)
            example, visit = next(passes[number])
            yield Item(index, example, visit, visit)
            index += 1

    def _passes(self, number: int, counter: RepeatCounter) -> Iterator[tuple[Example, int]]:
        """(example, pass) of one source, for ever. The buffer runs empty at the end of each pass."""
        visit = 0
        while True:
            words = bit_generator(self.seed, Purpose.STREAM_BUFFER, number, visit)
            buffer: list[Example] = []
            for example in self._open(self.sources[number]):
                name = repeat_id(example.id, counter((example.id, visit)))
                buffer.append(replace(example, id=name))
                if len(buffer) > self._buffer:
                    yield _take(buffer, int(words.random_raw())), visit
            while buffer:
                yield _take(buffer, int(words.random_raw())), visit
            visit += 1


def _take(buffer: list[Example], word: int) -> Example:
    slot = word % len(buffer)
    buffer[slot], buffer[-1] = buffer[-1], buffer[slot]
    return buffer.pop()


def _examples(source: SourceConfig, data: DataConfig, chat: ChatFormat, key: str) -> Iterator[Example]:
    """One pass over the good rows of a source. Skipped rows are logged, one by one."""
    found = False
    encoder = Encoder(source, data, chat, key, streaming=True)
    said: set[str] = set()
    for where, _, example in encoder:
        if new := encoder.unused_columns - said:
            said |= new
            logger.warning("%s: %s: columns that nothing is taken from: %s", key, where, ", ".join(sorted(new)))
        if not isinstance(example, BadRow):
            found = True
            yield example
        elif data.on_bad_row == "error" and not isinstance(example, OverLength):
            raise UserError(f"{key}: {where}: {example} (data.on_bad_row=skip leaves such rows out)")
        else:
            logger.warning("%s: %s: left out: %s", key, where, example)
    if not found:
        raise UserError(f"{key}: {source.path} gave no example")

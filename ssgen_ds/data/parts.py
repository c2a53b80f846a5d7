"""Tokenised rows, kept part by part: the start after an interrupted one continues where that one stopped.

The parts of a store that is being made lie in `.parts-KEY/`, one Arrow file for each `PART_ROWS` rows of a source:

    0-00003.arrow    source 0, rows 3 * PART_ROWS + 1 and on; what was left out of them is in the metadata

They are deleted when the store is complete, or when its data is refused. Parts of stores that were never finished are
deleted after two weeks.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ssgen_ds.data.readers import BadRow, Row
from ssgen_ds.data.records import Record, RecordMaker, read_rows
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

PART_ROWS = 1024
KEPT_DAYS = 14
GROUP_ROWS = 16  # given to a thread at a time
GROUPS_AHEAD = 32
MOST_THREADS = 8  # more would wait for Python's lock
_LEFT_OUT = b"left_out"

Encoded = tuple[str, Record, Example] | tuple[str, None, BadRow]  # place, record and example, or what is wrong


@dataclass
class StorePart:
    """Some rows of a source in their order. examples: by column. left_out: (place, what is wrong, over-length)."""

    examples: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, str, bool]] = field(default_factory=list)


class Encoder:
    """One pass over a source: its rows, tokenised."""

    def __init__(
        self, source: SourceConfig, data: DataConfig, chat: ChatFormat, key: str, streaming: bool = False
    ) -> None:
        self._rows = read_rows(source, key, streaming)
        self._make_record = RecordMaker(source, data, key)
        self._chat = chat
        self._key = key

    def skip(self, rows: int) -> int:
        """Pass over rows that an earlier start has tokenised; returns how many there were."""
        skipped = 0
        for _, row in islice(self._rows, rows):
            skipped += 1
            if not isinstance(row, BadRow):
                self._make_record.others.look_at(row)
        self._make_record.is_first = False
        return skipped

    @property
    def unused_columns(self) -> set[str]:
        """Columns of the rows so far that say something and that nothing is taken from."""
        return self._make_record.others.unused

    def __iter__(self) -> Iterator[Encoded]:
        """One row after another, each read when it is asked for."""
        for where, row in self._rows:
            yield self._encode(where, self._record(where, row))

    def take(self, rows: int, pool: ThreadPoolExecutor | None) -> Iterator[Encoded]:
        """The next `rows` rows in their order, tokenised by the threads of the pool."""
        if pool is None:
            yield from islice(self, rows)
            return
        waiting: deque[Future[list[Encoded]]] = deque()
        for group in self._groups(rows):
            waiting.append(pool.submit(lambda group: [self._encode(*one) for one in group], group))
            if len(waiting) > GROUPS_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _groups(self, rows: int) -> Iterator[list[tuple[str, Record | BadRow]]]:
        group = []
        for where, row in islice(self._rows, rows):
            group.append((where, self._record(where, row)))
            if len(group) == GROUP_ROWS:
                yield group
                group = []
        yield group

    def _record(self, where: str, row: Row | BadRow) -> Record | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return self._make_record(where, row)
        except BadRow as problem:
            return problem
        except UserError as error:
            raise self._at(where, error) from None

    def _encode(self, where: str, record: Record | BadRow) -> Encoded:
        if isinstance(record, BadRow):
            return where, None, record
        try:
            return where, record, self._chat.encode(record)
        except BadRow as problem:
            return where, None, problem
        except UserError as error:
            raise self._at(where, error) from None

    def _at(self, where: str, error: UserError) -> UserError:
        what = str(error).removeprefix(f"{self._key}: ").removeprefix(f"{where}: ")
        return UserError(f"{self._key}: {where}: {what}")


def encoded_rows(
    source: SourceConfig, data: DataConfig, chat: ChatFormat, key: str, streaming: bool = False
) -> Iterator[Encoded]:
    """One pass over a source without a store, for programs that look at rows: each is read when it is asked for."""
    return iter(Encoder(source, data, chat, key, streaming))


@contextmanager
def tokenizing_threads(chat: ChatFormat) -> Iterator[ThreadPoolExecutor | None]:
    """A pool with a thread for each core of this process; None where threads do not help.

    The other ranks of the machine wait meanwhile. A fast tokenizer works without Python's lock: about 60 % of the time
    for SmolLM2's. A slow one holds it.
    """
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS) if chat.tokenizer.is_fast else 1
    if threads == 1:
        yield None
        return
    chat.tokenizer("x", add_special_tokens=False)  # sets truncation and padding before several threads use it
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ssgen-tokenize")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encoded_parts(
    encoder: Encoder,
    folder: Path,
    number: int,
    schema: pa.Schema,
    to_row: Callable[[str, Record, Example], dict[str, Any]],
    tick: Callable[[], None],
    pool: ThreadPoolExecutor | None,
) -> Iterator[StorePart]:
    """All rows of source `number`, those that are in `folder` already from there. Calls `tick` at every row."""
    for index in count():
        file = folder / f"{number}-{index:05d}.arrow"
        part = _read(file, schema)
        tick()
        if part is not None:
            encoder.skip(len(part.examples) + len(part.left_out))
            yield part
            continue
        part = StorePart()
        for where, record, example in encoder.take(PART_ROWS, pool):
            tick()
            if isinstance(example, BadRow) or record is None:
                part.left_out.append((where, str(example), isinstance(example, OverLength)))
            else:
                part.examples.append(to_row(where, record, example))
        size = len(part.examples) + len(part.left_out)
        if size == PART_ROWS:  # a shorter rest is tokenised again in no time
            _write(file, part, schema)
        if size:
            yield part
        if size < PART_ROWS:
            return


def forget(folder: Path) -> None:
    """Delete the parts of a store, and what interrupted starts left next to it more than `KEPT_DAYS` ago."""
    shutil.rmtree(folder, ignore_errors=True)
    for other in [*folder.parent.glob(".parts-*"), *folder.parent.glob(".store-*")]:
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)


def _write(file: Path, part: StorePart, schema: pa.Schema) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    marked = schema.with_metadata({_LEFT_OUT: json.dumps(part.left_out)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as sink, pa.ipc.new_file(sink, marked) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(part.examples, marked))
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, file)
    except FileNotFoundError:
        pass  # another process has made this store meanwhile, and its parts are gone
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read(file: Path, schema: pa.Schema) -> StorePart | None:
    """None where there is no such part, or where it is damaged."""
    try:
        with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as reader:
            if not reader.schema.equals(schema):
                return None
            left_out = json.loads(reader.schema.metadata[_LEFT_OUT])
            examples = reader.read_all().to_pylist()
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
    part = StorePart(examples, [(where, what, over_length) for where, what, over_length in left_out])
    return part if len(examples) + len(part.left_out) == PART_ROWS else None

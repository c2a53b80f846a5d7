"""Examples on disk: they are tokenised once into an Arrow file, which later runs map into memory.

Host memory holds a few bytes an example (indices), never the examples. A store lives in `cache_dir/store-KEY/`:

    examples.arrow   one row an example, in the order of the sources
    summary.json     counts and the fingerprint
    skipped.txt      every row left out, as `place: why`
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ssgen_ds.data.parts import encoded_rows as encoded_rows
from ssgen_ds.data.parts import forget
from ssgen_ds.data.paths import new_folder, resolve_path
from ssgen_ds.data.readers import load_hub
from ssgen_ds.data.repeats import repeat_id, repeat_numbers
from ssgen_ds.data.store_writer import EXAMPLE_FIELDS, ROWS_PER_BATCH, SCHEMA, Summary, id_hash, write_examples
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

FORMAT = 4  # part of the cache key: raise it when what is stored, or how rows become tokens, changes


class Store(Sequence[Example]):
    """Memory-mapped examples, or (`indices`) a part of them.

    weights: one a source. sources: int32 (len,), each example's source. fingerprint: hex over the ids and tokens in
    order, for resume checks.
    """

    def __init__(self, folder: Path, weights: tuple[float, ...], indices: np.ndarray | None = None) -> None:
        self.folder = folder
        self.weights = weights
        self.summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        self._indices = indices
        self.fingerprint = self.summary.fingerprint
        if indices is not None:
            part = hashlib.blake2b(self.fingerprint.encode() + indices.astype("<i8").tobytes(), digest_size=16)
            self.fingerprint = part.hexdigest()

    def __len__(self) -> int:
        return self.summary.examples if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self._row(index % len(self))
        return Example(**{name: row[name] for name in EXAMPLE_FIELDS})

    def where(self, index: int) -> str:
        """The place (`file:line`) an example came from."""
        return self._row(index)["where"]

    def numbers(self, column: str) -> np.ndarray:
        """A fixed-width column, shape (len,)."""
        batches = (self._reader.get_batch(i).column(column).to_numpy() for i in range(self._reader.num_record_batches))
        values = np.concatenate(list(batches))
        return values if self._indices is None else values[self._indices]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together, of the whole store."""
        return self.summary.longest

    def part(self, indices: np.ndarray) -> Store:
        """A view of some examples, in the given order."""
        return Store(self.folder, self.weights, indices if self._indices is None else self._indices[indices])

    def rename(self, names: dict[int, str]) -> None:
        """Write the examples with other ids, by index, in place of the file. Only for the process that just made it."""
        partial = self.folder / "examples.partial"
        numbers = sorted(names)
        with partial.open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for number in range(self._reader.num_record_batches):
                batch, first = self._reader.get_batch(number), number * ROWS_PER_BATCH
                here = numbers[bisect_left(numbers, first) : bisect_left(numbers, first + batch.num_rows)]
                if here:
                    ids = batch.column("id").to_pylist()
                    for index in here:
                        ids[index - first] = names[index]
                    batch = batch.set_column(0, SCHEMA.field("id"), pa.array(ids, pa.string()))
                writer.write_batch(batch)
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "examples.arrow")

    def _row(self, index: int) -> dict[str, Any]:
        if self._indices is not None:
            index = int(self._indices[index])
        batch, row = divmod(index, ROWS_PER_BATCH)
        return self._reader.get_batch(batch).slice(row, 1).to_pylist()[0]


def build_store(
    sources: list[SourceConfig],
    data: DataConfig,
    chat: ChatFormat,
    cache_dir: Path,
    key: str = "data.train",
    tick: Callable[[], None] = lambda: None,
) -> Store:
    """Tokenise all sources into a store below `cache_dir`, or reopen the one that is there.

    Reused while files (path, size, time), tokenizer, template and data settings stay the same; weights may change.
    Raises UserError for bad rows (unless skipped), an empty source, one id given to different contents, or a cache that
    cannot be written. `key` names the recipe's entry in errors; `tick` is called at every row. An
    interrupted start leaves its parts for the next one.
    """
    weights = tuple(source.weight for source in sources)
    folder = Path(cache_dir) / f"store-{_cache_key(sources, data, chat, key)}"
    if not folder.is_dir():
        with _writing_to(folder.parent, key):
            _fill(folder, weights, sources, data, chat, key, tick)
    return Store(folder, weights)


def _fill(
    folder: Path,
    weights: tuple[float, ...],
    sources: list[SourceConfig],
    data: DataConfig,
    chat: ChatFormat,
    key: str,
    tick: Callable[[], None],
) -> None:
    """Make the store `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = new_folder(folder.parent, f".{folder.name}.")
    parts = folder.with_name(f".parts-{folder.name.removeprefix('store-')}")
    try:
        write_examples(temp, parts, sources, data, chat, key, tick)
        store = Store(temp, weights)
        _refuse_reused_ids(store, key)
        _number_repeats(store, key)
        _move_into_place(temp, folder)
        forget(parts)
    except UserError:
        forget(parts)
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def _writing_to(cache_dir: Path, key: str) -> Iterator[None]:
    """Inside, an OSError about the cache becomes a UserError that names it; errors about other files pass through."""
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        # A parent of the cache, where that could not be made.
        if not (named is None or named.is_relative_to(cache_dir) or cache_dir.is_relative_to(named)):
            raise
        raise UserError(
            f"{key}: what is tokenised cannot be kept in {cache_dir}: {error.strerror or error}; "
            "set SSGEN_CACHE to a folder that you may write to and that has room"
        ) from None


def split_store(store: Store, eval_fraction: float) -> tuple[Store, Store]:
    """(train, eval), by a hash of the id: stable when rows are added or reordered; equal ids stay on one side.

    Neither side is empty. Raises UserError if there are fewer than two different ids.
    """
    hashes = store.numbers("id_hash")
    chosen = hashes < np.uint64(min(eval_fraction * 2.0**64, 2.0**64 - 2.0**12))
    lowest, highest = hashes.min(), hashes.max()
    if lowest == highest:
        raise UserError("data.eval_fraction: needs at least two different examples; name a file in data.eval instead")
    if not chosen.any():
        chosen = hashes == lowest
    if chosen.all():
        chosen = hashes != highest
    return store.part(np.flatnonzero(~chosen)), store.part(np.flatnonzero(chosen))


def _refuse_reused_ids(store: Store, key: str) -> None:
    """One id must mean one content: samples and splits are keyed by the id."""
    ids, contents = store.numbers("id_hash"), store.numbers("content_hash")
    order = np.lexsort((contents, ids))
    clash = np.flatnonzero((np.diff(ids[order]) == 0) & (np.diff(contents[order]) != 0))
    problems = [
        f"id {store[int(order[i])].id!r}: {store.where(int(order[i]))} and {store.where(int(order[i + 1]))}"
        for i in clash[:20]
    ]
    if problems:
        fix = "name another id column in columns.id, or set columns: {id: ''} to use content hashes"
        raise UserError.from_list(f"{key}: {len(clash)} ids are given to rows of different content; {fix}", problems)


def _number_repeats(store: Store, key: str) -> None:
    """Give equal rows ids of their own; `id_hash` and the fingerprint stay those of the ids that they share."""
    numbers = repeat_numbers(store.numbers("id_hash"))
    repeats = np.flatnonzero(numbers > 1)
    if not len(repeats):
        return
    names = {int(i): repeat_id(store[int(i)].id, int(numbers[i])) for i in repeats}
    taken = np.isin(np.array([id_hash(name) for name in names.values()], np.uint64), store.numbers("id_hash"))
    if taken.any():
        index = int(repeats[np.argmax(taken)])
        raise UserError(
            f"{key}: {store.where(index)} repeats the id {store[index].id!r} and would be {names[index]!r}, which is "
            "another row's id; leave repeated rows out, or set columns: {id: ''} to use content hashes"
        )
    store.rename(names)


def _move_into_place(temp: Path, folder: Path) -> None:
    try:
        temp.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was faster: the same store is there
            raise


def _cache_key(sources: list[SourceConfig], data: DataConfig, chat: ChatFormat, key: str) -> str:
    """Hex over everything that decides what a store holds."""
    settings = data.model_dump(mode="json", exclude={"train", "eval", "eval_fraction", "chat_template", "streaming"})
    origins: list[Any] = []
    for source in sources:
        files = resolve_path(source.path, key)
        if files is None:
            origins.append([file["filename"] for file in load_hub(source, False, key).cache_files])
        else:
            stats = [(file.resolve(), file.stat()) for file in files]
            origins.append([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])
        origins.append(source.model_dump(mode="json", exclude={"weight"}))
    digest = hashlib.blake2b(digest_size=12)
    parts = [FORMAT, settings, origins, chat.fingerprint()]
    if chat.rows_below_tokenizer is not None:  # rows were refused by it
        parts.append(chat.rows_below_tokenizer)
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()

"""Examples on disk: tokenised once into an Arrow file, memory-mapped ever after.

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
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssgen_ds.config import DataConfig, SourceConfig
from ssgen_ds.data.paths import resolve_path
from ssgen_ds.data.readers import BadRow, load_hub
from ssgen_ds.data.records import BadRows, Record, RecordMaker, read_rows
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import UserError

FORMAT = 1  # part of the cache key: raise it when what is stored, or how rows become tokens, changes
ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_loss_mask", pa.list_(pa.int8())),
        ("response_ids", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
        ("reference", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("source", pa.int32()),
        ("where", pa.string()),
        ("id_hash", pa.uint64()),
        ("content_hash", pa.uint64()),
    ]
)
EXAMPLE_FIELDS = tuple(field.name for field in fields(Example))


@dataclass
class Summary:
    """What went into a store."""

    examples: int = 0
    bad_rows: int = 0
    over_length_rows: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    fingerprint: str = ""


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
        """Tokens of the longest prompt and response together."""
        most = 0
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            both = pc.add(*(pc.list_value_length(batch.column(name)) for name in ("prompt_ids", "response_ids")))
            most = max(most, pc.max(both).as_py() or 0)
        return most

    def part(self, indices: np.ndarray) -> Store:
        """A view of some examples, in the given order."""
        return Store(self.folder, self.weights, indices if self._indices is None else self._indices[indices])

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
) -> Store:
    """Tokenise all sources into a store below `cache_dir`, or reopen the one that is there.

    Reused while files (path, size, time), tokenizer, template and data settings stay the same; weights may change.
    Raises UserError for bad rows (unless skipped), an empty source, or one id given to different contents. `key` names
    the recipe's entry in errors.
    """
    weights = tuple(source.weight for source in sources)
    folder = Path(cache_dir) / f"store-{_cache_key(sources, data, chat, key)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(temp, sources, data, chat, key)
            _refuse_reused_ids(Store(temp, weights), key)
            _move_into_place(temp, folder)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return Store(folder, weights)


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


def id_hash(identifier: str) -> int:
    """Unsigned 64-bit hash of an example id."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def encoded_rows(
    source: SourceConfig, data: DataConfig, chat: ChatFormat, key: str, streaming: bool = False
) -> Iterator[tuple[str, Record, Example] | tuple[str, None, BadRow]]:
    """One pass over a source: (place, record, example), or (place, None, what is wrong)."""
    make_record = RecordMaker(source, data, key)
    for where, row in read_rows(source, key, streaming):
        try:
            if isinstance(row, BadRow):
                raise row
            record = make_record(where, row)
            example = chat.encode(record)
        except BadRow as problem:
            yield where, None, problem
        except UserError as error:
            what = str(error).removeprefix(f"{key}: ").removeprefix(f"{where}: ")
            raise UserError(f"{key}: {where}: {what}") from None
        else:
            yield where, record, example


def _write(folder: Path, sources: list[SourceConfig], data: DataConfig, chat: ChatFormat, key: str) -> None:
    summary, bad = Summary(), BadRows()
    digest = hashlib.blake2b(digest_size=16)
    with (
        (folder / "examples.arrow").open("wb") as file,
        (folder / "skipped.txt").open("w", encoding="utf-8", errors="backslashreplace") as skipped,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        rows: list[dict[str, Any]] = []
        for number, source in enumerate(sources):
            for row in _source_rows(number, source, data, chat, key, summary, bad, skipped):
                digest.update(json.dumps([row[name] for name in EXAMPLE_FIELDS]).encode() + b"\n")
                rows.append(row)
                if len(rows) == ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    rows = []
        if bad.total and data.on_bad_row == "error":
            raise bad.error(key)
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    summary.bad_rows = bad.total
    summary.fingerprint = digest.hexdigest()
    with (folder / "summary.json").open("w", encoding="utf-8") as file:
        json.dump(asdict(summary), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _source_rows(
    number: int,
    source: SourceConfig,
    data: DataConfig,
    chat: ChatFormat,
    key: str,
    summary: Summary,
    bad: BadRows,
    skipped: IO[str],
) -> Iterator[dict[str, Any]]:
    """Store rows of one source, counting as it goes. Raises UserError if the source gives no example at all."""
    seen = kept = 0
    reason = ""
    for where, record, example in encoded_rows(source, data, chat, key):
        seen += 1
        if record is None:
            reason = f"{where}: {example}"
            skipped.write(reason + "\n")
            if isinstance(example, OverLength):
                summary.over_length_rows += 1
            else:
                bad.add(where, example)
            continue
        kept += 1
        summary.examples += 1
        summary.truncated_prompts += example.prompt_truncated
        summary.truncated_responses += example.truncated
        summary.prompt_tokens += len(example.prompt_ids)
        summary.response_tokens += len(example.response_ids)
        row = {name: getattr(example, name) for name in EXAMPLE_FIELDS}
        content = int(record.content_hash[:16], 16)
        yield {**row, "source": number, "where": where, "id_hash": id_hash(record.id), "content_hash": content}
    if not seen:
        raise UserError(f"{key}: {source.path} holds no rows")
    if not kept and not (bad.total and data.on_bad_row == "error"):
        raise UserError(f"{key}: {source.path}: all {seen} rows were left out; the last: {reason}")


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
    digest.update(json.dumps([FORMAT, settings, origins, chat.fingerprint()], sort_keys=True).encode())
    return digest.hexdigest()

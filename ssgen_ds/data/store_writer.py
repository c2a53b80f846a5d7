"""What a store holds, and the one pass over the sources that writes it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ssgen_ds.data.parts import Encoder, StorePart, encoded_parts, tokenizing_threads
from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import BadRows, Record
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_loss_mask", pa.list_(pa.int8())),
        ("response_ids", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
        ("gold_text", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("source", pa.int32()),
        ("where", pa.string()),
        ("id_hash", pa.uint64()),
        ("content_hash", pa.uint64()),
    ]
)
EXAMPLE_FIELDS = tuple(one.name for one in fields(Example))


@dataclass
class Summary:
    """Counts of what a store holds and what was left out."""

    examples: int = 0
    bad_rows: int = 0
    over_length_rows: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0  # tokens of a prompt and its response together
    fingerprint: str = ""
    unused_columns: list[str] = field(default_factory=list)  # columns with content that nothing reads


def id_hash(identifier: str) -> int:
    """Unsigned 64-bit hash of an example id."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def write_examples(
    folder: Path,
    parts: Path,
    sources: list[SourceConfig],
    data: DataConfig,
    chat: ChatFormat,
    key: str,
    tick: Callable[[], None],
) -> None:
    """Fill the `folder` of a store, its parts in `parts`. Raises UserError; OSError when the disk is full."""
    summary, bad = Summary(), BadRows()
    digest = hashlib.blake2b(digest_size=16)
    with (
        (folder / "examples.arrow").open("wb") as file,
        (folder / "skipped.txt").open("w", encoding="utf-8", errors="backslashreplace") as skipped,
        pa.ipc.new_file(file, SCHEMA) as writer,
        tokenizing_threads(chat) as pool,
    ):
        rows: list[dict[str, Any]] = []
        unused: set[str] = set()
        for number, source in enumerate(sources):
            encoder = Encoder(source, data, chat, key)
            read = encoded_parts(encoder, parts, number, SCHEMA, partial(_row, number), tick, pool)
            for row in _source_rows(read, source, data, key, summary, bad, skipped):
                digest.update(json.dumps([row[name] for name in EXAMPLE_FIELDS]).encode() + b"\n")
                rows.append(row)
                if len(rows) == ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    rows = []
            unused |= encoder.unused_columns
        if bad.total and data.on_bad_row == "error":
            raise bad.error(key)
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    summary.bad_rows = bad.total
    summary.unused_columns = sorted(unused)
    summary.fingerprint = digest.hexdigest()
    with (folder / "summary.json").open("w", encoding="utf-8") as counts:
        json.dump(asdict(summary), counts, indent=1)
        counts.flush()
        os.fsync(counts.fileno())


def _row(number: int, where: str, record: Record, example: Example) -> dict[str, Any]:
    """The row of the store for an example of source `number`."""
    row = {name: getattr(example, name) for name in EXAMPLE_FIELDS}
    content = int(record.content_hash[:16], 16)
    return {**row, "source": number, "where": where, "id_hash": id_hash(record.id), "content_hash": content}


def _source_rows(
    parts: Iterator[StorePart],
    source: SourceConfig,
    data: DataConfig,
    key: str,
    summary: Summary,
    bad: BadRows,
    skipped: IO[str],
) -> Iterator[dict[str, Any]]:
    """Store rows of one source, counting as it goes. Raises UserError if the source gives no example at all."""
    seen = kept = 0
    reason = ""
    for part in parts:
        seen += len(part.examples) + len(part.left_out)
        kept += len(part.examples)
        for where, what, is_over_length in part.left_out:
            reason = f"{where}: {what}"
            skipped.write(reason + "\n")
            if is_over_length:
                summary.over_length_rows += 1
            else:
                bad.add(where, BadRow(what))
        for row in part.examples:
            summary.examples += 1
            summary.truncated_prompts += row["prompt_truncated"]
            summary.truncated_responses += row["truncated"]
            summary.prompt_tokens += len(row["prompt_ids"])
            summary.response_tokens += len(row["response_ids"])
            summary.longest = max(summary.longest, len(row["prompt_ids"]) + len(row["response_ids"]))
            yield row
    if not seen:
        raise UserError(f"{key}: {source.path} holds no rows")
    if not kept and not (bad.total and data.on_bad_row == "error"):
        raise UserError(f"{key}: {source.path}: all {seen} rows were left out; the last: {reason}")

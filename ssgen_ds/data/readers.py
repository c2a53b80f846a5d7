"""Files -> rows, each with the exact place it came from. Memory does not grow with the file, except for `.json`.

A row that cannot be read is yielded as a `BadRow` in place of the dictionary, so that the caller can count it, list it
and go on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.config import SourceConfig
from ssgen_ds.errors import UserError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
PARQUET_BATCH_ROWS = 256


class BadRow(Exception):
    """What is wrong with one row; the place is known to whoever reads it."""


def read_files(files: list[Path]) -> Iterator[tuple[str, Row | BadRow]]:
    """Rows of all files in order, as (place, row); place is `file:line`, `file: item N` or `file: row N`, from 1."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    for file in files:
        for where, row in readers[file.suffix](file):
            if not isinstance(row, dict | BadRow):
                row = BadRow(f"expected an object with columns, got {type(row).__name__}")
            yield where, row


def load_hub(source: SourceConfig, streaming: bool, key: str) -> datasets.Dataset | datasets.IterableDataset:
    """A hub data set. Raises UserError if it cannot be loaded."""
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{key}: {source.path!r} is no local path, and loading it from the hub failed "
            f"(split {source.split!r}, name {source.name!r}): {error}"
        ) from None


def read_hub(source: SourceConfig, rows: datasets.Dataset | datasets.IterableDataset) -> Iterator[tuple[str, Row]]:
    """Rows of a loaded hub data set, as (`id[split]: row N`, row), from 1."""
    for number, row in enumerate(rows, 1):
        yield f"{source.path}[{source.split}]: row {number}", row


def _parse(text: bytes) -> Any:
    """JSON or a BadRow."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start})")
    except RecursionError:
        return BadRow("not valid JSON: nested too deeply")
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}")


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    # Read as bytes: only \n ends a line (text may hold U+2028), and one bad byte costs one row, not the file.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", _parse(line)


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    content = _parse(file.read_bytes())
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else BadRow("expected an array, or an object that holds a single list")
    if isinstance(content, list):
        for number, item in enumerate(content, 1):
            yield f"{file}: item {number}", item
    elif isinstance(content, BadRow):
        yield str(file), content
    else:
        yield str(file), BadRow(f"expected an array of objects, got {type(content).__name__}")


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the default refuses cells above 128 KiB
    # surrogateescape: a bad byte must cost one row, not the file.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        reader = csv.reader(text)
        header: list[str] | None = None
        last_line = 0
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield f"{file}:{last_line + 1}", BadRow(f"not valid CSV: {error}")
                cells = []
            where, last_line = f"{file}:{last_line + 1}", reader.line_num
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            yield where, _csv_row(header, cells)


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell if not char.isascii()):
        return BadRow("not UTF-8")
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells, but the header names {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"{file}: row {number + 1}" if number else str(file), BadRow(f"not readable as parquet: {error}")

"""Files -> rows, each with the exact place it came from. Memory does not grow with the file, except for JSON arrays.

A row that cannot be read is yielded as a `BadRow` in place of the dictionary, so that the caller can count it, list it
and go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.data.text_files import read_csv, read_json
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import SourceConfig

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
PARQUET_BATCH_ROWS = 256


def read_files(files: list[Path]) -> Iterator[tuple[str, Row | BadRow]]:
    """Rows of all files in order, as (place, row); place is `file:line`, `file: item N` or `file: row N`, from 1."""
    readers = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": _read_parquet}
    for file in files:
        for where, row in readers[file.suffix.lower()](file):
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
        yield f"{source.path}[{source.split}]: row {number}", without_nulls(row)


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(f"{file}: has the column {twice[0]!r} twice; rename or remove one of them")
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"{file}: row {number + 1}" if number else str(file), BadRow(f"not readable as parquet: {error}")


def without_nulls(row: Row) -> Row:
    """The row without null keys inside its values: a column of structs has every key in every row, most of them null.

    Columns and items of lists that are null stay.
    """
    return {name: _pruned(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value

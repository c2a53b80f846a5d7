"""Rounds on disk: `selfgen/round-00001.parquet`, one row for each slot, written and renamed by rank 0."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssgen_ds.selfgen.rounds import Generated

_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("visit", pa.int64()),
        ("mix_rate", pa.float64()),
        ("gold_ids", _TOKENS),
        ("coins", pa.list_(pa.bool_())),
        ("mixed_ids", _TOKENS),
        ("bss_passes", pa.int32()),
        ("draft_ids", _TOKENS),
        ("draft_stop_id", pa.int32()),
        ("draft_kept", pa.int32()),
        ("rewrite_ids", _TOKENS),
        ("rewrite_stop_id", pa.int32()),
        ("target_ids", _TOKENS),
        ("target_kind", pa.string()),
    ]
)


def round_path(run_dir: Path, number: int) -> Path:
    """File of the 1-based round."""
    return run_dir / "selfgen" / f"round-{number:05d}.parquet"


def write_round(path: Path, records: list[Generated]) -> None:
    """Write all records of a round; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist([asdict(record) for record in records], SCHEMA), partial, compression="zstd")
    os.replace(partial, path)


def read_round(path: Path, example_ids: list[str] | None = None) -> list[Generated]:
    """The records of a round, in the order of their slots; of these examples only, when given."""
    chosen = None if example_ids is None else pc.field("example_id").isin(pa.array(example_ids, pa.string()))
    return [Generated(**row) for row in pq.read_table(path, schema=SCHEMA, filters=chosen).to_pylist()]


def read_example_ids(path: Path) -> list[str]:
    """The examples of a round, in the order of their slots; no tokens are read."""
    return pq.read_table(path, columns=["example_id"]).column("example_id").to_pylist()

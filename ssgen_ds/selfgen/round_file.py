"""Rounds on disk: `selfgen/round-00001.parquet`, one row for each slot, written and renamed by rank 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ssgen_ds.run.files import fsync, named
from ssgen_ds.sampler.free import FreeSample
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Target

_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # from 0, as in the first release: one less than everywhere else, see `to_row`
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


def write_round(path: Path, records: list[Generated]) -> None:
    """Write all records of a round; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    table = pa.Table.from_pylist([to_row(record) for record in records], SCHEMA)
    try:
        pq.write_table(table, partial, compression="zstd")
        fsync(partial)  # else a power cut may leave the name with nothing behind it
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise named(error, path) from None


def read_round(path: Path) -> list[Generated]:
    """The records of a round, in the order of their slots."""
    return [from_row(row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def to_row(record: Generated) -> dict[str, Any]:
    """A row of the file. Its steps count from 0, so that older runs resume and older programs read the file."""
    mixed, draft, rewrite, target = record.mixed, record.draft, record.rewrite, record.target
    return {
        "step": record.step - 1,
        "example_id": record.example_id,
        "visit": record.visit,
        "mix_rate": record.mix_rate,
        "gold_ids": record.gold_ids,
        "coins": mixed.coins if mixed else None,
        "mixed_ids": mixed.ids if mixed else None,
        "bss_passes": mixed.passes if mixed else 0,
        "draft_ids": draft.ids if draft else None,
        "draft_stop_id": draft.stop_id if draft else None,
        "draft_kept": draft.kept if draft else None,
        "rewrite_ids": rewrite.ids if rewrite else None,
        "rewrite_stop_id": rewrite.stop_id if rewrite else None,
        "target_ids": target.ids if target else None,
        "target_kind": target.kind if target else None,
    }


def from_row(row: dict[str, Any]) -> Generated:
    """The record of a row of the file."""
    mixed = draft = rewrite = target = None
    if row["mixed_ids"] is not None:
        mixed = Mixed(row["coins"], row["mixed_ids"], row["bss_passes"])
    if row["draft_ids"] is not None:
        draft = Draft(row["draft_ids"], row["draft_stop_id"], row["draft_kept"])
    if row["rewrite_ids"] is not None:
        rewrite = FreeSample(row["rewrite_ids"], row["rewrite_stop_id"])
    if row["target_ids"] is not None:
        target = Target(row["target_ids"], row["target_kind"])
    return Generated(
        step=row["step"] + 1,
        example_id=row["example_id"],
        visit=row["visit"],
        mix_rate=row["mix_rate"],
        gold_ids=row["gold_ids"],
        mixed=mixed,
        draft=draft,
        rewrite=rewrite,
        target=target,
    )

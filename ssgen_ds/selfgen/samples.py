"""A few examples of every round as text, for people and the report: `selfgen/samples.jsonl`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.run.files import append_whole
from ssgen_ds.run.layout import SAMPLES_FILE
from ssgen_ds.selfgen.generated import Generated, Mixed, Slot

PER_ROUND = 4
BLOCK_BYTES = 2**14


def describe_records(run_dir: Path, number: int, slots: list[Slot], records: list[Generated], chat: ChatFormat) -> None:
    """Append the last records of a round; a round that is generated again after a resume replaces its lines.

    However many rounds there are, little more than the end of the file is read. Raises OSError: it cannot be written,
    and what earlier rounds left is still there.
    """
    chosen = list(zip(slots, records, strict=True))[-PER_ROUND:]  # the last: mix_rate grows
    lines = [json.dumps(describe(number, slot, record, chat), ensure_ascii=False) + "\n" for slot, record in chosen]
    path = run_dir / SAMPLES_FILE
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(_end_of_earlier_rounds(file, number))
    append_whole(path, "".join(lines))


def _end_of_earlier_rounds(file: BinaryIO, number: int) -> int:
    """Where the last whole line of a round before `number` ends. What comes after it is of a continuation that was
    given up, or was torn by a kill or a power cut."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start, line = _last_line(file, end)
        if line.endswith(b"\n") and _round_of(line) < number:
            break
        end = start
    return end


def _last_line(file: BinaryIO, end: int) -> tuple[int, bytes]:
    """The start and the bytes of the line that ends at `end`."""
    line, start = b"", end
    while start:
        block_start = max(0, start - BLOCK_BYTES)
        file.seek(block_start)
        line, start = file.read(start - block_start) + line, block_start
        newline = line.rfind(b"\n", 0, len(line) - 1)
        if newline >= 0:
            return start + newline + 1, line[newline + 1 :]
    return start, line


def _round_of(line: bytes) -> float:
    """Infinite for a line that is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return math.inf
    number = row.get("round") if isinstance(row, dict) else None
    return number if isinstance(number, int) else math.inf


def describe(number: int, slot: Slot, record: Generated, chat: ChatFormat) -> dict[str, Any]:
    """One record as text; `mixed` is a list of (text, is_sampled) runs."""

    return {
        "round": number,
        "step": record.step,
        "example_id": record.example_id,
        "prompt": chat.decode(slot.example.prompt_ids),
        "gold": chat.decode(record.gold_ids),
        "mixed": mixed_runs(record.mixed, chat) if record.mixed else None,
        "draft": chat.decode(record.draft.ids) if record.draft else None,
        "draft_kept": chat.decode(record.draft.kept_ids) if record.draft else None,
        "correction_target": chat.decode(record.target.ids) if record.target else None,
        "target_kind": record.target.kind if record.target else None,
    }


def mixed_runs(mixed: Mixed, chat: ChatFormat) -> list[tuple[str, bool]]:
    """The mixed context as runs of gold and sampled tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, coin in zip(mixed.ids, mixed.coins, strict=True):
        if runs and runs[-1][1] == coin:
            runs[-1][0].append(token)
        else:
            runs.append(([token], coin))
    return [(chat.decode(ids), coin) for ids, coin in runs]

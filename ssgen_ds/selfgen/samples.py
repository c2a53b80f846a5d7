"""A few examples of every round as text, for people and the report: `selfgen/samples.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.files import write_whole
from ssgen_ds.selfgen.rounds import Generated, Slot

PER_ROUND = 4


def describe_records(run_dir: Path, number: int, slots: list[Slot], records: list[Generated], chat: ChatFormat) -> None:
    """Append the last records of a round; a round that is generated again after a resume replaces its lines."""
    path = run_dir / "selfgen" / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["round"] < number]
    chosen = list(zip(slots, records, strict=True))[-PER_ROUND:]  # the last: mix_rate grows
    kept += [json.dumps(describe(number, slot, record, chat), ensure_ascii=False) for slot, record in chosen]
    write_whole(path, "\n".join(kept) + "\n")


def describe(number: int, slot: Slot, record: Generated, chat: ChatFormat) -> dict[str, Any]:
    """One record as text; `mixed` is a list of (text, is_sampled) runs."""

    def text(ids: list[int] | None) -> str | None:
        return None if ids is None else chat.decode(ids)

    return {
        "round": number,
        "step": record.step + 1,
        "example_id": record.example_id,
        "prompt": chat.decode(slot.example.prompt_ids),
        "gold": text(record.gold_ids),
        "mixed": None if record.mixed_ids is None else mixed_runs(record, chat),
        "draft": text(record.draft_ids),
        "draft_kept": None if record.draft_ids is None else text(record.draft_ids[: record.draft_kept]),
        "correction_target": text(record.target_ids),
        "target_kind": record.target_kind,
    }


def mixed_runs(record: Generated, chat: ChatFormat) -> list[tuple[str, bool]]:
    """The mixed context as runs of gold and sampled tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, coin in zip(record.mixed_ids or [], record.coins or [], strict=True):
        if runs and runs[-1][1] == coin:
            runs[-1][0].append(token)
        else:
            runs.append(([token], coin))
    return [(chat.decode(ids), coin) for ids, coin in runs]

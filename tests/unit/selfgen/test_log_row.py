"""What a step was trained on, counted by hand."""

from __future__ import annotations

from ssgen_ds.config import MethodConfig
from ssgen_ds.data.tokenize import Example
from ssgen_ds.selfgen.log_row import generated_row
from ssgen_ds.selfgen.rounds import Generated, Slot

END = 2
SLOTS = [Slot(0, Example("a", [5], None, [6, 7, END], truncated=False, reference="x"), 0, 0.25)]


def record(**changes: object) -> Generated:
    return Generated(0, "a", 0, 0.25, [6, 7, END], **changes)


def test_drafts_are_counted_by_how_they_ended() -> None:
    ended = record(draft_ids=[6], draft_stop_id=END, target_ids=[6, 7, END], target_kind="reference")
    cut = record(draft_ids=[6, 7], target_ids=[6, END], target_kind="rewrite")
    empty = record(draft_ids=[], draft_stop_id=END)
    row = generated_row(MethodConfig(name="rac"), SLOTS, [ended, cut, empty, record()])
    assert row == {
        "mix_rate": 0.25, "sampled_token_share": 0.0,
        "num_corrections": 2, "num_empty_drafts": 1, "num_truncated_drafts": 1, "num_rewrites_used": 1,
    }  # fmt: skip


def test_the_sampled_share_is_of_all_response_tokens() -> None:
    row = generated_row(MethodConfig(name="bss"), SLOTS, [record(coins=[True, False, False]), record(), record()])
    assert row == {"mix_rate": 0.25, "sampled_token_share": 1 / 9}

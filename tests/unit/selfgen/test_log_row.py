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
    right = record(draft_ids=[6, 7], draft_stop_id=END, target_ids=[6, 7, END], target_kind="reference")
    row = generated_row(MethodConfig(name="rac"), SLOTS, [ended, cut, empty, right, record()])
    assert row == {
        "mix_rate": 0.25, "sampled_token_share": 0.0,
        "num_corrections": 3, "num_empty_drafts": 1, "num_truncated_drafts": 1, "num_right_drafts": 1,
        "num_rewrites_used": 1,
    }  # fmt: skip


def test_the_shares_are_of_all_response_tokens() -> None:
    """Of nine tokens four are sampled, and two of those are not what the reference has."""
    sampled = record(coins=[True, True, False], mixed_ids=[6, 9, END])
    wrong = record(coins=[True, True, False], mixed_ids=[8, 7, END])
    row = generated_row(MethodConfig(name="bss"), SLOTS, [sampled, wrong, record()])
    assert row == {"mix_rate": 0.25, "sampled_token_share": 4 / 9, "changed_token_share": 2 / 9}

"""What a step was trained on, counted by hand."""

from __future__ import annotations

from ssgen_ds.recipe.schema import MethodConfig
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Target
from ssgen_ds.selfgen.log_row import generated_row

END = 2


def record(**changes: object) -> Generated:
    return Generated(0, "a", 0, 0.25, [6, 7, END], **changes)


def test_drafts_are_counted_by_how_they_ended() -> None:
    ended = record(draft=Draft([6], END, 1), target=Target([6, 7, END], "reference"))
    cut = record(draft=Draft([6, 7], None, 2), target=Target([6, END], "rewrite"))
    empty = record(draft=Draft([], END, 0))
    right = record(draft=Draft([6, 7], END, 2), target=Target([6, 7, END], "reference"))
    row = generated_row(MethodConfig(name="rac"), [ended, cut, empty, right, record()])
    assert row == {
        "mix_rate": 0.25, "sampled_token_share": 0.0,
        "num_corrections": 3, "num_empty_drafts": 1, "num_truncated_drafts": 1, "num_right_drafts": 1,
        "num_rewrites_used": 1,
    }  # fmt: skip


def test_the_shares_are_of_all_response_tokens() -> None:
    """Of nine tokens four are sampled, and two of those are not what the reference has."""
    sampled = record(mixed=Mixed([True, True, False], [6, 9, END], 1))
    wrong = record(mixed=Mixed([True, True, False], [8, 7, END], 1))
    row = generated_row(MethodConfig(name="bss"), [sampled, wrong, record()])
    assert row == {"mix_rate": 0.25, "sampled_token_share": 4 / 9, "changed_token_share": 2 / 9}

"""Texts side by side, by hand: what is chosen, what is marked, what all prompts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.report.read_run import Evaluation, load_run
from ssgen_ds.report.texts import Frame, answer_texts, changed_words, choose_answers, common_frame
from tests.support.report_folder import BASE, evaluate_run, make_run


def test_changed_words_are_marked_and_blanks_between_them() -> None:
    before, after = changed_words("The road is open today.", "The road was closed today.")
    assert before == [("The road ", False), ("is open", True), (" today.", False)]
    assert after == [("The road ", False), ("was closed", True), (" today.", False)]


def test_texts_without_blanks_are_compared_by_characters() -> None:
    assert changed_words("道路开放", "道路封闭")[1] == [("道路", False), ("封闭", True)]


def test_very_long_texts_are_not_compared() -> None:
    long = "word " * 2000
    assert changed_words(long, "other") == ([(long, False)], [("other", False)])


@given(st.text(alphabet="ab \n。道", max_size=30), st.text(alphabet="ab \n。道", max_size=30))
def test_runs_add_up_to_their_text(before: str, after: str) -> None:
    old, new = changed_words(before, after)
    assert "".join(text for text, _ in old) == before and "".join(text for text, _ in new) == after
    assert "".join(text for text, marked in old if not marked).split() == (
        "".join(text for text, marked in new if not marked).split()
    )
    if before == after:
        assert not any(marked for _, marked in [*old, *new])


END = "<|end|>\n<|assistant|>"
PROMPTS = [f"<|user|>\nSum up.\n\nRain {word}.{END}" for word in ("fell", "stopped")]


def test_what_all_prompts_share_is_taken_off_by_whole_lines_and_words() -> None:
    frame = common_frame(PROMPTS)
    assert frame == Frame("<|user|>\nSum up.\n\n", ".<|end|>\n<|assistant|>")
    assert [frame.strip(prompt) for prompt in PROMPTS] == ["Rain fell", "Rain stopped"]


@pytest.mark.parametrize("prompts", [[], ["one\ntwo"], ["one\ntwo"] * 2, ["1\nred cat", "1\nred dog"]])
def test_single_prompts_and_short_likeness_keep_theirs(prompts: list[str]) -> None:
    assert common_frame(prompts) == Frame()


@given(st.lists(st.text(alphabet="ab\n ", max_size=30), max_size=5))
def test_a_frame_fits_every_prompt(prompts: list[str]) -> None:
    frame = common_frame(prompts)
    for prompt in prompts:
        assert prompt.startswith(frame.before) and prompt.endswith(frame.after)
        assert len(frame.before) + len(frame.after) <= len(prompt)


def evaluation(*scores: tuple[float, float]) -> Evaluation:
    """(first, last) scores of corrected answers."""
    rows = [
        {"id": str(number), "scores": {"f1": last}, "first_scores": {"f1": first}}
        for number, (first, last) in enumerate(scores)
    ]
    return Evaluation("after", {}, rows)


def ids(chosen: list[tuple[str, list[dict[str, Any]]]]) -> dict[str, str]:
    return {title: "".join(row["id"] for row in rows) for title, rows in chosen}


def test_answers_are_chosen_by_what_correcting_changed_then_by_score() -> None:
    chosen = evaluation((0.5, 0.5), (0.2, 0.9), (0.9, 0.1), (1, 1), (0, 0), (0.1, 0.3), (0.4, 0.8), (0.6, 0.6))
    assert ids(choose_answers(chosen, "f1")) == {
        "Better for being corrected": "16",
        "Worse for being corrected": "2",
        "The best answers": "37",
        "The worst answers": "45",
    }


def test_no_answer_is_shown_twice() -> None:
    assert ids(choose_answers(evaluation((0.5, 0.5), (0.7, 0.7)), "f1")) == {"The best answers": "10"}
    assert ids(choose_answers(evaluation((0.5, 0.5)), None)) == {"The first answers": "0"}


def test_answers_stand_beside_those_before_training(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    evaluate_run(run_dir)
    section = answer_texts(load_run(run_dir))
    assert (section.name, section.metric) == ("trained", "ROUGE-L")
    assert section.frame.before == "<|im_start|>user\nSummarize:\n\n"
    cards = [card for _, cards in section.groups for card in cards]
    for card in cards:
        assert card.prompt.startswith("Rain near ") and "im_start" not in card.prompt
        assert [text.title for text in card.texts] == ["Reference", "Before training", "First answer", "Corrected"]
        assert [text.mark for text in card.texts[2:]] == ["del", "ins"]
    unchanged = [card for card in cards if card.texts[3].note.startswith("unchanged")]
    assert unchanged and all(not marked for card in unchanged for _, marked in card.texts[3].pieces)


def test_without_predictions_nothing_is_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert answer_texts(load_run(run_dir)).groups == []
    evaluate_run(run_dir)
    for file in (run_dir / "evaluations").glob("*.predictions.jsonl"):
        file.unlink()
    run = load_run(run_dir)
    assert answer_texts(run).groups == [] and run.is_base(BASE)

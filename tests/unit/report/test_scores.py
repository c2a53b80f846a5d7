"""Evaluations as the report shows them: which are compared, on what scale, and in what words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssgen_ds.report.read_run import Run, load_run
from ssgen_ds.report.scores import (
    base_of,
    behaviour_rows,
    correction_rows,
    describe_settings,
    group_evaluations,
    interval,
    main_evaluation,
    number,
    paired_change,
    probability,
)
from ssgen_ds.report.texts import answer_texts
from tests.support.report_folder import BASE, evaluate_run, make_predictions, make_run, write_evaluation


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run_dir = make_run(tmp_path / "run")
    evaluate_run(run_dir)
    others = {"data": "other.jsonl", "model": "m"}
    predictions = make_predictions(3, 0.9, corrected=True, number=8)
    write_evaluation(run_dir / "evaluations", "elsewhere", predictions, **others)
    return load_run(run_dir)


def test_the_run_itself_is_what_counts_and_the_base_what_it_is_compared_with(run: Run) -> None:
    one = main_evaluation(run)
    assert one is not None and one.name == "trained"
    base = base_of(run, one)
    assert base is not None and base.name == "base"
    for change in ({"data": "other.jsonl"}, {"num_examples": 8}):
        assert base_of(run, replace(one, content=one.content | change)) is None, "other examples"


def test_the_base_was_answered_in_the_same_way_where_there_is_such_a_result(run: Run) -> None:
    folder, settings = run.folder / "evaluations", run.by_command[0].content["settings"]
    for name, changes in (("a-base", {"temperature": 1.0}), ("z-base", {"correct": 1}), ("y-base", {"seed": 7})):
        write_evaluation(folder, name, make_predictions(1, 0.4), settings=settings | changes)
    run = load_run(run.folder)
    one = main_evaluation(run)
    assert one is not None and one.name == "trained"
    base = base_of(run, one)
    assert base is not None and base.name == "z-base"
    sampled = replace(one, content=one.content | {"settings": settings | {"temperature": 1.0}})
    base = base_of(run, sampled)
    assert base is not None and base.name == "a-base"


def test_of_two_evaluations_of_a_run_the_one_of_the_later_step_counts(run: Run) -> None:
    own = {"model": str(run.folder), "model_step": 300}
    write_evaluation(run.folder / "evaluations", "later", make_predictions(4, 0.7), **own)
    one = main_evaluation(load_run(run.folder))
    assert one is not None and one.name == "later"


def test_equal_rows_of_an_earlier_version_are_paired_by_their_place(tmp_path: Path) -> None:
    """They share an id in the older result, and have numbers in the newer one."""
    run_dir = make_run(tmp_path / "run")
    for name, numbers, model in (("base", ("", ""), BASE), ("mine", ("", "#2"), str(run_dir))):
        rows = [row | {"id": f"x{number}"} for row, number in zip(make_predictions(2, 0.5), numbers, strict=False)]
        write_evaluation(run_dir / "evaluations", name, rows, model=model)
    run = load_run(run_dir)
    base, mine = run.by_command
    assert [row["id"] for row in base.predictions] == ["x", "x#2"]
    change = paired_change(base, mine, "rougeL")
    assert change is not None and change["mean"] == 0
    texts = [text for _, cards in answer_texts(run).groups for card in cards for text in card.texts]
    before = [text.pieces for text in texts if text.title == "Before training"]
    assert len(before) == 2 and before == [text.pieces for text in texts if text.title == "Answer"]


def test_only_evaluations_on_the_same_examples_share_a_scale(run: Run) -> None:
    first, second = group_evaluations(run)
    assert [one.name for one in first.evaluations] == ["base", "trained"]
    assert first.caption == "24 examples of held-out.jsonl", "they were answered in different ways"
    assert second.caption == "8 examples of other.jsonl, greedy, at most 32 tokens, up to 1 correction"
    plot = next(plot for plot in first.plots if plot.title == "ROUGE-L")
    assert [(bar.label, bar.is_base) for bar in plot.bars] == [
        ("base", True), ("trained, first answer", False), ("trained, corrected", False)
    ]  # fmt: skip
    for bar in plot.bars:
        assert 0 <= bar.left <= bar.dot <= bar.left + bar.width <= 100
        assert bar.dot == pytest.approx(100 * (bar.score["mean"] - plot.low) / (plot.high - plot.low), abs=0.01)


def test_a_score_without_spread_has_a_scale(run: Run) -> None:
    plot = next(plot for plot in group_evaluations(run)[0].plots if plot.title == "Exact match")
    assert (plot.low, plot.high) == (0, 1) and {bar.dot for bar in plot.bars} == {0}


def test_changes_are_of_the_same_examples(run: Run) -> None:
    base, trained = run.by_command[0], main_evaluation(run)
    assert trained is not None
    change = paired_change(base, trained, "rougeL")
    assert change is not None
    assert change["mean"] == pytest.approx(trained.scores["rougeL"]["mean"] - base.scores["rougeL"]["mean"])
    assert paired_change(base, trained, "nosuch") is None
    trained.predictions.pop()
    assert paired_change(base, trained, "rougeL") is None


def test_corrections_add_up(run: Run) -> None:
    trained = main_evaluation(run)
    assert trained is not None
    for row in correction_rows(trained):
        assert row.better + row.same + row.worse == pytest.approx(100)
        assert row.better == pytest.approx(100 * row.improved / 24)
    assert correction_rows(run.by_command[0]) == []


def test_behaviour_in_cells(run: Run) -> None:
    base = run.by_command[0]
    assert behaviour_rows([base]) == [["base", "83%", "1.00", "17.0", "0%", "0%"]]
    base.content["behaviour"]["length_ratio"] = None
    assert behaviour_rows([base])[0][2] == "–"


def test_words_for_numbers() -> None:
    assert interval({"mean": 0.2314, "low": 0.21, "high": 0.25}) == "0.231 [0.210, 0.250]"
    assert interval({"mean": -0.01, "low": -0.02, "high": 0.0}, "+") == "−0.010 [−0.020, +0.000]"
    assert [number(value) for value in (0.5, 12.34, None)] == ["0.500", "12.3", "–"]
    assert [probability(value) for value in (0.0001, 0.0123)] == ["p < 0.001", "p = 0.012"]
    greedy = {"temperature": 0.0, "max_new_tokens": 64, "correct": 0, "top_k": 0, "top_p": 1.0}
    assert describe_settings(greedy) == "greedy, at most 64 tokens"
    sampled = greedy | {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "samples": 4, "correct": 2}
    assert describe_settings(sampled) == (
        "temperature 0.7, top-k 50, top-p 0.9, at most 64 tokens, 4 answers each, up to 2 corrections"
    )

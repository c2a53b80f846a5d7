"""Warnings: each rule fires on what it is for, and none on a healthy run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssgen_ds.report.page import load_run
from ssgen_ds.report.warnings import find_warnings, loss_spikes
from ssgen_ds.run.logbook import read_rows
from tests.support.report_folder import (
    BASE,
    evaluate_run,
    make_predictions,
    make_sample,
    write_evaluation,
    write_lines,
)

MakeRun = Callable[..., Path]


def edit_rows(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run_dir / "metrics.jsonl"
    write_lines(path, [row | change(row) for row in read_rows(path)])


def test_a_healthy_run_has_no_warnings(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    assert find_warnings(load_run(run_dir)) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda row: {"loss": 9.0} if row["step"] in (40, 70) else {}, "The loss jumped at steps 40, 70;"),
        (lambda row: {"loss": None} if row["step"] == 7 else {}, "not finite at step 7;"),
        (lambda row: {"grad_norm": None}, "not finite at steps 1, 2, 3, 4, 5 and 91 more;"),
        (lambda row: {"eval_loss": 3.0} if row["step"] == 96 else {}, "ended at 3.000, above its best, 2.291"),
        (lambda row: {"sampled_token_share": 0.0}, "No token was sampled"),
        (
            lambda row: {"sampled_token_share": row["mix_rate"] / 2},
            "6.3% of the response tokens were sampled, the",
        ),
        (
            lambda row: {"changed_token_share": 0.2 if row["step"] < 49 else 0.004},
            "In the later half of the run only 2% of the sampled tokens differed from gold",
        ),
        (lambda row: {"num_right_drafts": 20}, "1920 of 3072 drafts were the reference already"),
        (
            lambda row: {"num_corrections": 0, "num_truncated_drafts": 0, "num_right_drafts": 0},
            "Every draft was empty",
        ),
        (
            lambda row: {"num_truncated_drafts": 32},
            "No draft ended by itself: all 3072 were cut",
        ),
        (lambda row: {"num_truncated_drafts": 17}, "1632 of 3072 drafts were cut at method.rac.max_draft_tokens, 128"),
        (
            lambda row: (
                {"loss": None, "skipped_steps": 1} if row["step"] == 7 else {"skipped_steps": int(row["step"] > 7)}
            ),
            "not finite at step 7; 1 update was left out",
        ),
        (lambda row: {"selfgen_ties": 100}, "Rounding may have decided"),
        (lambda row: {"selfgen_verified": 100, "selfgen_mismatches": 6}, "576 of 9,600 sampled tokens came out diff"),
        (
            lambda row: {"num_corrections": 1, "num_empty_drafts": 3, "num_truncated_drafts": 0, "num_right_drafts": 0},
            "288 of 384 drafts were empty",
        ),
    ],
)
def test_warnings_from_the_metrics(make_run: MakeRun, change: Callable[..., dict[str, Any]], warning: str) -> None:
    run_dir = make_run()
    edit_rows(run_dir, change)
    (found,) = find_warnings(load_run(run_dir))
    assert warning in found


def test_warning_about_corrections_that_copy_their_draft(make_run: MakeRun) -> None:
    run_dir = make_run()
    copied = make_sample(1, "b", correction_target="Rain fell on Monday near Whitby. ", target_kind="rewrite")
    write_lines(run_dir / "selfgen" / "samples.jsonl", [make_sample(1, "a"), copied])
    (found,) = find_warnings(load_run(run_dir))
    assert found.startswith("1 of 2 sampled corrections copy their draft")


def test_no_warning_about_a_correction_that_is_its_draft_now_and_then(make_run: MakeRun) -> None:
    run_dir = make_run()
    copied = make_sample(1, "b", correction_target="Rain fell on Monday near Whitby.")
    write_lines(run_dir / "selfgen" / "samples.jsonl", [make_sample(1, str(number)) for number in range(5)] + [copied])
    assert find_warnings(load_run(run_dir)) == []


def test_warning_about_failures_on_the_way(make_run: MakeRun) -> None:
    run_dir = make_run()
    rows = [{"recipe": "5f", "job": None}, {"step": 0}, {"outcome": "failed", "reason": "rank 1 was lost"}, {"step": 8}]
    write_lines(run_dir / "attempts.jsonl", rows)
    (found,) = find_warnings(load_run(run_dir))
    assert found == "It failed 1 time on the way, the last with: rank 1 was lost"


BEHAVIOUR = {"eos_rate": 0.9, "length_ratio": 1.0, "repetition": 0.0, "empty_rate": 0.0, "mean_tokens": 17.0}
WORSE = {"mean": -0.1, "low": -0.2, "high": -0.01, "p_value": 0.01}


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"eos_rate": 0.0}, "Evaluation after: no answer ended by itself within 32 tokens; look at the labels"),
        ({"empty_rate": 0.2}, "Evaluation after: 20% of the answers are empty"),
        ({"repetition": 0.4}, "Evaluation after: answers repeat themselves, 40% of their 4-grams"),
        ({"length_ratio": 2.5}, "Evaluation after: answers are 2.5 times as long as the references"),
        ({"length_ratio": 0.25}, "Evaluation after: answers are 0.25 times as long as the references"),
    ],
)
def test_warnings_about_how_the_answers_are(make_run: MakeRun, change: dict[str, float], warning: str) -> None:
    run_dir = make_run()
    behaviour = BEHAVIOUR | change
    write_evaluation(run_dir / "evaluations", "after", make_predictions(1, 0.5), model="x", behaviour=behaviour)
    write_evaluation(run_dir / "evaluations", "base", make_predictions(1, 0.5), model=BASE, behaviour=behaviour)
    (found,) = find_warnings(load_run(run_dir))  # not of the model before training
    assert found.startswith(warning)


def test_warnings_about_corrections_at_inference(make_run: MakeRun) -> None:
    run_dir = make_run()
    file = run_dir / "evaluations" / "after.json"
    write_evaluation(file.parent, "after", make_predictions(1, 0.5, corrected=True), model="x")
    content = json.loads(file.read_text())
    changes = {"rougeL": WORSE, "f1": WORSE | {"high": 0.0}, "rouge1": WORSE | {"p_value": 0.12}}
    content["correction"] |= {"unchanged_share": 0.95, "change": changes}
    file.write_text(json.dumps(content))
    copied, worse = find_warnings(load_run(run_dir))
    assert copied == "Evaluation after: correcting left 95% of the answers as they were."
    assert worse == ("Evaluation after: correcting made answers worse, ROUGE-L changed by −0.100 [−0.200, −0.010].")


def test_warning_about_answers_that_never_end_in_other_numbers(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "evaluations").mkdir()
    (run_dir / "evaluations" / "after.json").write_text('{"free": {"eos_rate": 0.0}}')
    (found,) = find_warnings(load_run(run_dir))
    assert found.startswith("evaluations/after.json: no answer ended with EOS (free.eos_rate is 0)")


def test_a_steady_decline_has_no_spikes() -> None:
    assert loss_spikes([{"step": step, "loss": 3.0 / step} for step in range(1, 200)]) == []
    assert loss_spikes([{"step": step, "loss": 2.0 + (step == 15)} for step in range(1, 30)]) == [15]


@pytest.mark.parametrize(("last", "spikes"), [(3.7, []), (3.9, [22])])
def test_a_noisy_loss_needs_a_higher_spike(last: float, spikes: list[int]) -> None:
    """Losses 1.7, 2.0 and 2.3 in turn: median 2.0, median deviation 0.3; the line is at 2.0 + 6 * 0.3 = 3.8."""
    losses = [1.7, 2.0, 2.3] * 7 + [last]
    assert loss_spikes([{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]) == spikes

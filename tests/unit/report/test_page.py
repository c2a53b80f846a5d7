from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.errors import UserError
from ssgen_ds.report.costs import generation_facts, memory_bars, time_bars
from ssgen_ds.report.curves import round_costs, smooth, smoothing_window
from ssgen_ds.report.page import findings, headline, key_facts, load_run, write_report
from ssgen_ds.report.read_run import flatten_numbers
from ssgen_ds.run.logbook import read_rows
from tests.support.report_folder import (
    BASE,
    HOSTILE,
    evaluate_run,
    make_gap,
    make_predictions,
    make_sample,
    write_evaluation,
    write_lines,
)

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, headings, links to elsewhere and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "xlink:href", "src", "srcset", "action"):
                self.addresses.append(value or "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data


def page_of(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def edit_rows(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run_dir / "metrics.jsonl"
    write_lines(path, [row | change(row) for row in read_rows(path)])


def test_the_page_needs_nothing_from_elsewhere(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    page = page_of(run_dir)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and "<link" not in text
    assert [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")] == []
    assert not list(run_dir.glob("*.partial"))


def test_warnings_come_first_and_only_where_there_are_any(make_run: MakeRun) -> None:
    run_dir = make_run()
    assert "Worth a look" not in page_of(run_dir).text
    edit_rows(run_dir, lambda row: {"loss": 9.0} if row["step"] in (40, 70) else {})
    text = page_of(run_dir).text
    assert "1 thing worth a look" in text and "Worth a look\n\nThe loss jumped at steps 40, 70" in text


def test_texts_of_the_run_are_escaped(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    page = page_of(run_dir)
    assert "script" not in page.tags and "b" not in page.tags
    assert page.text.count(HOSTILE) > 6  # prompts of samples, and once around the prompts of answers


def test_title_status_and_headline(make_run: MakeRun) -> None:
    run_dir = make_run()
    page = page_of(run_dir)
    for part in (
        "bss+rac-run",
        "Batch-scheduled sampling with correction",
        "SmolLM2-135M",
        "finished",
        "step 96 of 96",
    ):
        assert part in page.text
    numbers = dict(headline(load_run(run_dir)))
    assert numbers["tokens trained"] == "288k"  # 96 * 3000
    assert numbers["corrections trained"] == "2.9k"  # 96 * 30
    assert numbers["total time"] == "5m00s"  # 96 * 2 s and 12 rounds * 9 s
    assert numbers["generation's share of the time"] == "36%"  # 108 / (192 + 108)
    assert numbers["sampled-token share"] == "12.1%"  # 0.24 / 96 * mean(1..96)
    assert numbers["evaluation loss, first → last"] == "2.649 → 2.241"  # 2.2 + exp(-24/30), exp(-96/30)


def test_sections_come_in_order(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    edit_rows(run_dir, lambda row: {"loss": 9.0} if row["step"] == 50 else {})
    text = page_of(run_dir).text
    order = [
        *("ROUGE-L before training", "A gold token costs", "total time", "Set-up", "Worth a look", "24 examples of"),
        *("While training", "What correcting did: trained", "How the answers are", "The training-inference gap"),
        *("Where the gap is", "What it answers", "Better for being corrected", "The best answers", "The worst answers"),
        *(
            "Loss",
            "Self-generated tokens",
            "Learning rate",
            "Gradient norm",
            "In a mixed context",
            "Round 1",
            "Round 12",
        ),
        *("Time, starting", "Peak memory", "Passes per round", "Time spent generating", "Generating", "Recipe"),
        "Environment",
    ]
    place = 0
    for part in order:
        place = text.find(part, place)
        assert place >= 0, part


def test_a_run_under_way(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=1, finished=False)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # being written while we read
    text = page_of(run_dir).text
    assert "in progress" in text and "step 1 of 96" in text
    assert text.count("Round 1") == 1


def test_sft_shows_nothing_of_generation(make_run: MakeRun) -> None:
    run_dir = make_run(method="sft")
    quiet = {"mix_rate": 0.0, "sampled_token_share": 0.0, "selfgen_passes": 0, "selfgen_seconds": 0.0}
    quiet |= {"selfgen_calls": 0, "peak_generate_bytes": 0}
    edit_rows(run_dir, lambda row: quiet)
    (run_dir / "selfgen" / "samples.jsonl").unlink()
    text = page_of(run_dir).text
    text = text[: text.index("Recipe")]
    assert not any(
        part in text for part in ("Self-generated", "Passes", "enerating", "What it trained on", "orrection")
    )
    assert "Loss" in text and "Gradient norm" in text


def test_sampled_tokens_are_marked_and_cut_text_struck_out(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=8)
    write_lines(run_dir / "selfgen" / "samples.jsonl", [make_sample(1, "a")])
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "The coast road<mark> at</mark> Whitby was closed on<mark> Tuesday</mark> after" in html
    assert "Rain fell on Monday near Whitby.<del> The road is open. The road is open.</del>" in html


def test_samples_without_some_texts(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=8)
    nothing = {"draft": None, "draft_kept": None, "correction_target": None, "target_kind": None}
    samples = [make_sample(1, "a", **nothing), make_sample(1, "b", mixed=None, **(nothing | {"draft": ""}))]
    write_lines(run_dir / "selfgen" / "samples.jsonl", samples)
    text = page_of(run_dir).text
    assert "(empty)" in text and "Correction" not in text


def test_numbers_of_other_files_are_tabled(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=8)
    (run_dir / "evaluations").mkdir()
    for name, value in (("base", 0.25), ("trained", 0.5)):
        content = {"rouge": {"rougeL": value}, "model": "m", "predictions": [{"text": "zebra"}]}
        (run_dir / "evaluations" / f"{name}.json").write_text(json.dumps(content))
    text = page_of(run_dir).text
    assert re.search(r"Other numbers\s*base\s*trained\s*rouge\.rougeL\s*0\.25\s*0\.5", text)
    assert "zebra" not in text


def test_flatten_numbers() -> None:
    assert flatten_numbers({"a": 1, "b": {"c": 2.5, "d": {"e": 0}}, "f": True, "g": "x", "h": [1]}) == {
        "a": 1, "b.c": 2.5, "b.d.e": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "not a run folder, it has no recipe.yaml;"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no optimizer step is finished yet"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no optimizer step is finished yet"),
        (
            lambda run: (run / "environment.json").write_text("{"),
            r"environment\.json: damaged: .*; the next start writes it again",
        ),
        (
            lambda run: write_lines(run / "evaluations" / "a.json", [{"kind": "evaluation", "model": "m"}]),
            r"a\.json: damaged: data: Field required; make it again or delete it",
        ),
        (
            lambda run: (run / "recipe.yaml").write_text("- a"),
            r"recipe\.yaml: damaged: expected a mapping, got list",
        ),
    ],
)
def test_bad_folders_are_explained(make_run: MakeRun, damage: Callable[[Path], Any], message: str) -> None:
    run_dir = make_run(num_steps=2)
    damage(run_dir)
    with pytest.raises(UserError, match=message):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_a_report_of_a_folder_that_cannot_be_written_goes_elsewhere(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, out = make_run(), tmp_path / "page.html"
    (run_dir / ".partial-report.html").mkdir()  # as little to be written as on a read-only disk, also for root
    with pytest.raises(UserError, match=r"report\.html cannot be written \(.*\); `ssgen report RUN --out FILE\.html`"):
        write_report(run_dir)
    assert write_report(run_dir, out) == out and out.read_text("utf-8").startswith("<!doctype html>")
    for wrong in (tmp_path, tmp_path / "page.txt"):
        with pytest.raises(UserError, match=r"--out: .* is no file that ends in \.html"):
            write_report(run_dir, wrong)


def test_findings_say_what_came_out(make_run: MakeRun) -> None:
    run_dir = make_run()
    assert findings(load_run(run_dir)) == []
    evaluate_run(run_dir)
    first, second = findings(load_run(run_dir))
    number = r"[+−]?\d\.\d{3}"
    three = rf"{number} \[{number}, {number}\]"
    sure = rf"{three}, p < 0\.001"
    assert re.fullmatch(
        rf"ROUGE-L before training: {three}; after, corrected: {three}, a paired change of {sure}\.", first
    )
    assert re.fullmatch(rf"Correcting changed ROUGE-L by {sure}: 18 answers became better, 0 worse\.", second)


@pytest.mark.parametrize(("other", "when"), [("base", "after"), ("trained", "before")])
def test_findings_of_one_evaluation_say_of_what(make_run: MakeRun, other: str, when: str) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    for file in (run_dir / "evaluations").glob("*.json"):
        if file.stem == other or file.stem.startswith("step-"):
            file.unlink()
    assert findings(load_run(run_dir))[0].startswith(f"ROUGE-L {when} training: 0.")


def test_findings_of_training_alone_name_the_best_step(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    for name in ("base", "trained"):
        (run_dir / "evaluations" / f"{name}.json").unlink()
    (sentence,) = findings(load_run(run_dir))
    assert sentence.startswith("ROUGE-L at step 72: 0.559 [")
    text = page_of(run_dir).text
    assert "step 24" in text and "step 96" in text and "step 48" not in text  # first, best, last in the table


def test_a_run_that_evaluates_nothing_but_its_loss(make_run: MakeRun) -> None:
    """With `eval.best: loss` the files of evaluations/ have no scores and no behaviour."""
    run_dir = make_run()
    for step in (48, 96):
        own = {"model": str(run_dir), "step": step, "loss": 2.0, "scores": {}, "behaviour": {}}
        write_evaluation(run_dir / "evaluations", f"step-{step:08d}", make_predictions(1, 0.5), **own)
        (run_dir / "evaluations" / f"step-{step:08d}.predictions.jsonl").write_text("")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "best.json").write_text('{"step": 48, "metric": "loss", "value": 2.0}')
    page = page_of(run_dir)
    assert "best, step 48" in page.text and "How the answers are" not in page.text
    assert "What it answers" not in page.text


def test_costs_add_up(make_run: MakeRun) -> None:
    run_dir = make_run()
    edit_rows(run_dir, lambda row: {"checkpoint_seconds": 50.0} if row["step"] in (25, 49) else {})
    run = load_run(run_dir)
    assert [(part.name, part.text, part.percent) for part in time_bars(run)] == [
        ("train", "3m12s, 48%", 48.0), ("generate", "1m48s, 27%", 27.0), ("save", "1m40s, 25%", 25.0)
    ]  # fmt: skip
    assert [(part.name, part.text, round(part.percent)) for part in memory_bars(run.rows)] == [
        ("train", "3.00 GiB", 100), ("generate", "1.00 GiB", 33), ("optimizer", "2.00 GiB", 67)
    ]  # fmt: skip
    facts = dict(generation_facts(run))
    assert facts["model calls"] == "1,440"  # 12 rounds * 120
    assert facts["tokens made final by a pass"] == "2.50" and facts["guesses that were right"] == "25%"
    assert facts["redraws that changed the token; theory's bound"] == "30%; 40%"


def test_the_recipe_at_a_glance(make_run: MakeRun) -> None:
    facts = dict(key_facts(load_run(make_run())))
    assert facts["model"] == BASE and facts["data"] == "train.jsonl" and facts["trained weights"] == "all"
    assert facts["mix rate"] == "0.1, constant" and facts["ran on"] == "2 ranks, cpu, ZeRO 3"
    assert facts["corrections"] == "towards the reference, weight 1" and facts["began"] == "2026-01-31 12:00"


def test_the_gap_of_one_model(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "gap").mkdir()
    gap = make_gap([("mine", str(run_dir))], changes=(0.5,))
    (run_dir / "gap" / "gap.json").write_text(json.dumps(gap))
    text = page_of(run_dir).text
    assert "A gold token costs mine 0.500 more nats after its own tokens than after gold ones." in text


def test_a_comparison_is_shown(make_run: MakeRun) -> None:
    run_dir = make_run()
    evaluate_run(run_dir)
    change = {"rougeL": {"mean": -0.0125, "low": -0.02, "high": -0.005, "p_value": 0.0102}}
    sides = {"before": {"model": "A"}, "after": {"model": "B"}}
    (run_dir / "evaluations" / "a-b.json").write_text(json.dumps({"kind": "comparison", **sides, "difference": change}))
    text = page_of(run_dir).text
    assert re.search(r"a-b: B against A.*ROUGE-L\s*−0\.013 \[−0\.020, −0\.005\]\s*p = 0\.010", text, re.DOTALL)


def test_rounds_are_summed_up() -> None:
    rows = [
        {"step": 1, "round": 1, "selfgen_passes": 5, "selfgen_seconds": 6.0, "step_seconds": 1.0},
        {"step": 2, "round": 1, "selfgen_passes": 0, "selfgen_seconds": 0.0, "step_seconds": 1.0},
        {"step": 3, "round": 2, "selfgen_passes": 4, "selfgen_seconds": 1.0, "step_seconds": 3.0},
    ]
    assert [(item.number, item.passes, item.generation_share) for item in round_costs(rows)] == [
        (1, 5, 0.75), (2, 4, 0.25)
    ]  # fmt: skip


def test_smoothing_by_hand() -> None:
    assert smooth([3.0, 0.0, 6.0, 3.0, 1.0], 3).tolist() == pytest.approx([3.0, 3.0, 3.0, 10 / 3, 1.0])
    assert [smoothing_window(steps) for steps in (1, 39, 40, 96, 1000)] == [1, 1, 3, 5, 51]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 10))
def test_smoothing_stays_within_the_data_and_keeps_straight_lines(values: list[float], reach: int) -> None:
    smoothed = smooth(values, 2 * reach + 1)
    assert smoothed.min() >= min(values) - 1e-9 and smoothed.max() <= max(values) + 1e-9
    line = [2.0 * index for index in range(len(values))]
    assert np.allclose(smooth(line, 2 * reach + 1), line)

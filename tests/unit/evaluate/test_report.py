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
from ssgen_ds.evaluate.curves import smooth, smoothing_window, summarize_rounds
from ssgen_ds.evaluate.report import find_warnings, flatten_numbers, headline, load_run, loss_spikes, write_report
from ssgen_ds.logbook import read_rows

from .conftest import HOSTILE, make_sample, write_lines

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
    page = page_of(run_dir)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and "<link" not in text
    assert [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")] == []
    assert not list(run_dir.glob("*.partial"))


def test_texts_of_the_run_are_escaped(make_run: MakeRun) -> None:
    page = page_of(make_run())
    assert "script" not in page.tags and "b" not in page.tags
    assert HOSTILE in page.text


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
    assert numbers["generation's share of the time"] == "36%"  # 108 / 300
    assert numbers["sampled-token share"] == "12.1%"  # 0.24 / 96 * mean(1..96)
    assert numbers["evaluation loss, first → last"] == "2.649 → 2.241"  # 2.2 + exp(-24/30), exp(-96/30)


def test_sections_come_in_order(make_run: MakeRun) -> None:
    run_dir = make_run()
    edit_rows(run_dir, lambda row: {"loss": 9.0} if row["step"] == 50 else {})
    text = page_of(run_dir).text
    curves = [
        "Loss",
        "Self-generated tokens",
        "Passes per round",
        "Time spent generating",
        "Learning rate",
        "Gradient norm",
    ]
    examples = ["What it trained on", "Round 1", "Round 12"]
    order = ["total time", *curves, *examples, "Worth a look", "Recipe", "Environment"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


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
    edit_rows(run_dir, lambda row: quiet)
    (run_dir / "selfgen" / "samples.jsonl").unlink()
    text = page_of(run_dir).text
    assert not any(
        part in text for part in ("Self-generated", "Passes", "generating", "What it trained on", "corrections")
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


def test_evaluations_are_tabled_without_their_predictions(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=8)
    (run_dir / "evaluations").mkdir()
    for name, value in (("base", 0.25), ("trained", 0.5)):
        content = {"rouge": {"rougeL": value}, "model": "m", "predictions": [{"text": "zebra"}]}
        (run_dir / "evaluations" / f"{name}.json").write_text(json.dumps(content))
    text = page_of(run_dir).text
    assert re.search(r"base\s*trained\s*rouge\.rougeL\s*0\.25\s*0\.5", text)
    assert "zebra" not in text


def test_flatten_numbers() -> None:
    assert flatten_numbers({"a": 1, "b": {"c": 2.5, "d": {"e": 0}}, "f": True, "g": "x", "h": [1]}) == {
        "a": 1, "b.c": 2.5, "b.d.e": 0
    }  # fmt: skip


def test_a_healthy_run_has_no_warnings(make_run: MakeRun) -> None:
    run_dir = make_run()
    assert find_warnings(load_run(run_dir)) == []
    assert "Worth a look" not in page_of(run_dir).text


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda row: {"loss": 9.0} if row["step"] in (40, 70) else {}, "The loss jumped at steps 40, 70;"),
        (lambda row: {"loss": None} if row["step"] == 7 else {}, "not finite at step 7;"),
        (lambda row: {"grad_norm": None}, "not finite at steps 1, 2, 3, 4, 5 and 91 more;"),
        (lambda row: {"eval_loss": 3.0} if row["step"] == 96 else {}, "ended at 3.000, above its best, 2.291"),
        (lambda row: {"sampled_token_share": 0.0}, "No token was sampled"),
        (lambda row: {"num_corrections": 0}, "Every draft was empty"),
        (lambda row: {"num_corrections": 1, "num_empty_drafts": 3}, "288 of 384 drafts were empty"),
    ],
)
def test_warnings_from_the_metrics(make_run: MakeRun, change: Callable[..., dict[str, Any]], warning: str) -> None:
    run_dir = make_run()
    edit_rows(run_dir, change)
    (found,) = find_warnings(load_run(run_dir))
    assert warning in found
    assert "Worth a look" in page_of(run_dir).text


def test_warning_about_corrections_that_copy_their_draft(make_run: MakeRun) -> None:
    run_dir = make_run()
    copied = make_sample(1, "b", correction_target="Rain fell on Monday near Whitby. ", target_kind="rewrite")
    write_lines(run_dir / "selfgen" / "samples.jsonl", [make_sample(1, "a"), copied])
    (found,) = find_warnings(load_run(run_dir))
    assert found.startswith("1 of 2 sampled corrections copy their draft")


def test_warning_about_answers_that_never_end(make_run: MakeRun) -> None:
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "not a run folder, it has no recipe.yaml;"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no optimizer step is finished yet"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no optimizer step is finished yet"),
        (
            lambda run: (run / "environment.json").write_text("{"),
            r"environment\.json: damaged: .*; restore or delete it",
        ),
        (lambda run: (run / "recipe.yaml").write_text("- a"), r"recipe\.yaml: expected a mapping, got list"),
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


def test_rounds_are_summed_up() -> None:
    rows = [
        {"step": 1, "round": 1, "selfgen_passes": 5, "selfgen_seconds": 6.0, "step_seconds": 1.0},
        {"step": 2, "round": 1, "selfgen_passes": 0, "selfgen_seconds": 0.0, "step_seconds": 1.0},
        {"step": 3, "round": 2, "selfgen_passes": 4, "selfgen_seconds": 1.0, "step_seconds": 3.0},
    ]
    assert [(item.number, item.passes, item.generation_share) for item in summarize_rounds(rows)] == [
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

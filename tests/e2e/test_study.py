"""The controlled study, end to end with a handful of steps on one task: runs, resuming, summary, plots, document."""

from __future__ import annotations

import json

import pytest

from bench.study.run import prepare, run_all
from bench.study.settings import Run, Settings, TaskSize
from bench.study.summary import write_summary
from bench.study.worker import result_path

SETTINGS = Settings(
    tasks={"sort": TaskSize(num_train=24, train_lengths=(3, 6), eval_lengths=(3, 6), steps=3)},
    methods=("sft", "bss .25 constant", "bss+rac"),
    seeds=(0,),
    width=32,
    layers=2,
    batch=8,
    refresh_every=2,
    eval_each=4,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of the runs, with one of three results taken away and made again."""
    folder = tmp_path_factory.mktemp("study")
    prepare(SETTINGS, folder)
    assert run_all(SETTINGS, folder, jobs=1) == []
    return folder


def test_every_run_trains_and_measures(done):
    results = {m: json.loads(result_path(done, Run("sort", m, 0)).read_text()) for m in SETTINGS.methods}
    for method, result in results.items():
        assert len(result["greedy"]) == len(result["sampled"]) == 8
        assert ("greedy_corrected" in result) == (method == "bss+rac")
        assert result["seconds"]["num_steps"] == 3
        assert (result["seconds"]["generation"] > 0) == (method != "sft")
        assert len(result["generated"]) == (0 if method == "sft" else 2), "two rounds were made"
    late = results["bss .25 constant"]["generated"][1]
    assert 0 < late["wrong_in_context"] < 0.5 and late["drafts_right"] is None
    assert results["bss+rac"]["generated"][1]["drafts_right"] == 0.0, "three steps teach nothing"
    sft, bss = results["sft"]["gap"], results["bss .25 constant"]["gap"]
    assert sft["own"] == sft["sft"]
    assert bss["own"]["0.0"] == bss["sft"]["0.0"] and bss["own"]["1.0"] != bss["sft"]["1.0"]
    assert results["bss .25 constant"]["seconds"]["sampled_token_share"] > 0.1


def test_what_is_done_is_not_made_again_and_other_settings_are_refused(done, capsys):
    assert run_all(SETTINGS, done, jobs=0) == []
    assert capsys.readouterr().out.startswith("0 of 3 runs")
    with pytest.raises(SystemExit, match="other settings"):
        prepare(Settings(), done)


def test_the_summary_holds_every_method_and_the_document_every_figure(done, tmp_path):
    summary = write_summary(SETTINGS, done, tmp_path / "results", tmp_path)
    entry = summary["tasks"]["sort"]["bss+rac"]
    assert list(summary["tasks"]["sort"]) == list(SETTINGS.methods)
    assert entry["corrections"]["greedy"]["answers"] == 8
    assert summary["tasks"]["sort"]["sft"]["versus_sft"]["greedy"]["mean"] == 0.0
    text = (tmp_path / "results-controlled.md").read_text()
    assert "| BSS .1, linear, and RAC, corrected once |" in text and "What a method costs" in text
    for name in ("length", "gap"):
        assert (tmp_path / "results" / f"study-controlled-{name}.png").stat().st_size > 10_000

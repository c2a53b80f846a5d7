"""The study on SmolLM2: its split, and the table made from scores alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.quality import run, table


def test_the_split_is_by_id_and_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"id": str(i), "document": "d", "summary": "s"}) for i in range(500)]
    source = tmp_path / "rows.jsonl"
    monkeypatch.setattr(run, "SOURCE", "rows")
    monkeypatch.setattr(run, "resolve_package_path", lambda _: source)

    def parts(lines: list[str]) -> dict[str, set[str]]:
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        run.split(tmp_path / "data")
        names = ("train", "test")
        return {name: set((tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()) for name in names}

    whole = parts(rows)
    assert whole["train"] | whole["test"] == set(rows) and not whole["train"] & whole["test"]
    assert 70 < len(whole["test"]) < 130
    some = parts(rows[::-1][:250])
    assert some["test"] <= whole["test"] and some["train"] <= whole["train"]


def scores(values: list[float], seed: int, steps: int) -> dict:
    rows = [{"rouge1": value, "rouge2": value, "rougeL": value} for value in values]
    behaviour = {"eos_rate": 0.5}
    return {
        "seed": seed, "steps": steps, "num_tokens": 100, "behaviour": behaviour, "scores": rows, "first_scores": None,
    }  # fmt: skip


def test_the_table_pairs_examples_and_seeds_and_finds_the_equal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 steps of BSS take as long as 40 of SFT, so step 48 of the longer run is compared, not step 36.

    Differences are of means over the seeds.
    """
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    longer = [replace(run, checkpoints=(36, 48)) if run.name == "sft_long" else run for run in table.RUNS]
    monkeypatch.setattr(table, "RUNS", longer)
    folder = tmp_path / "study"
    folder.mkdir()
    costs = {"sft": (3.0, 0.0), "bss10": (3.2, 1.8)}
    (tmp_path / "study-costs.json").write_text(
        json.dumps({name: {"train_seconds": train, "selfgen_seconds": made} for name, (train, made) in costs.items()})
    )
    for seed in (0, 1):
        measured = {
            "sft": ([0.1, 0.2], 24), "bss10": ([0.3 + 0.1 * seed, 0.2], 24),
            "sft_long-step36": ([0.9, 0.9], 36), "sft_long-step48": ([0.2, 0.1], 48),
        }  # fmt: skip
        for name, (values, steps) in measured.items():
            stem, dash, step = name.partition("-")
            content = scores(values, seed, steps)
            (folder / f"{stem}-{seed}{dash}{step}.json").write_text(json.dumps(content), encoding="utf-8")
    table.write_results(folder)
    sft, bss = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert (sft["title"], bss["title"]) == ("SFT", "BSS, mix rate .1")
    assert bss["rougeL"]["mean"] == pytest.approx((0.35 + 0.2) / 2)
    assert bss["by_seed"]["rougeL"] == pytest.approx([0.25, 0.3])
    assert bss["against_sft"]["mean"] == pytest.approx(0.125) and bss["against_sft"]["wins"] == 1
    assert bss["equal_time"]["steps"] == 48 and bss["equal_time"]["mean"] == pytest.approx(0.125)
    assert "against_sft" not in sft
    assert "| BSS, mix rate .1 | 0.275 |" in (tmp_path / "page.md").read_text()

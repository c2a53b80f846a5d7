"""The study on SmolLM2: its split, and the table made from scores alone."""

import json
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
    """24 steps of BSS .1 take as long as 32 of SFT, of BSS .25 as long as 40, of BSS and RAC as long as 800: the
    shortest run that had the time counts, none for the last. Differences are of means over the seeds."""
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    folder = tmp_path / "study"
    folder.mkdir()
    costs = {"sft": (3.0, 0.0), "bss10": (3.2, 0.8), "bss25": (3.2, 1.8), "bss_rac": (50.0, 50.0)}
    (tmp_path / "study-costs.json").write_text(
        json.dumps({name: {"train_seconds": train, "selfgen_seconds": made} for name, (train, made) in costs.items()})
    )
    for seed in (0, 1):
        better = [0.3 + 0.1 * seed, 0.2]
        measured = {
            "sft": ([0.1, 0.2], 24), "bss10": (better, 24), "bss25": (better, 24), "sft_long": ([0.2, 0.1], 32),
            "rac": ([0.3, 0.3], 24), "sft_longer": ([0.3, 0.1], 75), "bss_rac": (better, 24),
        }  # fmt: skip
        for name, (values, steps) in measured.items():
            content = scores(values, seed, steps)
            if "rac" in name:
                content["first_scores"] = scores([0.2, 0.3], seed, steps)["scores"]
            (folder / f"{name}-{seed}.json").write_text(json.dumps(content), encoding="utf-8")
    table.write_results(folder)
    sft, bss, costlier, direct, corrected, _, costliest = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert (sft["title"], bss["title"]) == ("SFT", "BSS, mix rate .1")
    assert bss["rougeL"]["mean"] == pytest.approx((0.35 + 0.2) / 2)
    assert bss["by_seed"]["rougeL"] == pytest.approx([0.25, 0.3])
    assert bss["against_sft"]["mean"] == pytest.approx(0.125) and bss["against_sft"]["wins"] == 1
    assert bss["equal_time"]["steps"] == 32 and bss["equal_time"]["mean"] == pytest.approx(0.125)
    assert costlier["equal_time"]["steps"] == 75 and costlier["equal_time"]["mean"] == pytest.approx(0.075)
    assert costliest["equal_time"] is None and "against_sft" not in sft
    assert direct["rougeL"]["mean"] == pytest.approx(0.25) and "against_direct" not in direct
    assert corrected["against_direct"]["mean"] == pytest.approx(0.05)
    page = (tmp_path / "page.md").read_text()
    assert "| BSS, mix rate .1 | 0.275 |" in page and "corrected against direct: RAC +0.050 [" in page
    assert "(32 steps) | 4.0 |" in page and "(75 steps) | 5.0 |" in page

"""Every file of a run folder, damaged in every way: one message that names it, or the same result."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.compare import compare
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.report.page import render_report
from ssgen_ds.report.read_run import load_run
from ssgen_ds.run.folder import check_records, open_run, read_recipe
from tests.support.damage import FILES
from tests.support.report_folder import evaluate_run, make_run

NAMES = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "attempts.jsonl", "finished.json", "selfgen/samples.jsonl",
    "checkpoints/best.json", "evaluations/step-00000072.json", "evaluations/step-00000072.predictions.jsonl",
    "evaluations/trained.json", "evaluations/trained.predictions.jsonl", "gap/gap.json", "gap/other.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("whole") / "run")
    evaluate_run(run_dir)
    starts = [{"recipe": "5f", "job": ""}, {"step": 0}, {"outcome": "finished", "reason": ""}]
    (run_dir / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    shutil.copyfile(run_dir / "gap" / "gap.json", run_dir / "gap" / "other.json")
    check_records(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def undamaged(whole: Path) -> object:
    (said,) = use(whole, compares=True)
    return said


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time, and reads nothing of a file that `load_run` has not read."""
    for place in ("page.draw_curves", "page.draw_cost_curves", "page.draw_score_curves", "gap_figure.gap_curves"):
        monkeypatch.setattr(f"ssgen_ds.report.{place}", lambda *arguments: [])


def use(run_dir: Path, compares: bool, renders: bool = False) -> list[object]:
    """What commands make of a folder: what the report shows, or their messages."""
    base, trained = (run_dir / "evaluations" / f"{name}.json" for name in ("base", "trained"))
    said: list[object] = []
    for work in (
        lambda: open_run(read_recipe(run_dir / "recipe.yaml").model_copy(update={"output_dir": str(run_dir)})),
        lambda: compare(base, trained) if compares else None,
        lambda: said.append(replace(load_run(run_dir), folder=Path())),
        lambda: render_report(load_run(run_dir)) if renders else None,
    ):
        try:
            work()
        except UserError as problem:
            said.append(str(problem))
    return said


# What such a damage leaves is whole: a run that is a step younger, or one with nothing in this file yet; nothing of
# environment.json decides anything, and a best step is derived where the recipe says by what.
LEFT = {
    "torn": ("metrics.jsonl", "attempts.jsonl", "selfgen/samples.jsonl", "checkpoints/best.json"),
    "empty": ("attempts.jsonl", "selfgen/samples.jsonl", "checkpoints/best.json"),
    "a-list": ("attempts.jsonl", "selfgen/samples.jsonl", "checkpoints/best.json"),
    "garbage": ("checkpoints/best.json",),
    "other-shape": ("environment.json", "attempts.jsonl", "checkpoints/best.json"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named_or_changes_nothing(whole: Path, undamaged: object, tmp_path: Path, name: str) -> None:
    for damage, spoil in FILES.items():
        run_dir = tmp_path / damage / "run"
        shutil.copytree(whole, run_dir)
        file = run_dir / name
        file.write_bytes(spoil(file.read_bytes()))
        said = use(run_dir, compares=name.startswith("evaluations/"), renders=damage == "other-shape")
        messages = [text for text in said if isinstance(text, str)]
        is_named = any(str(file) in text for text in messages)
        assert is_named or (not messages and (said == [undamaged] or name in LEFT.get(damage, ()))), (
            name,
            damage,
            messages,
        )


@pytest.mark.parametrize("predictions", ["../x.jsonl", "/etc/passwd", "a/b", "", ".", ".."])
def test_predictions_are_beside_their_evaluation(whole: Path, tmp_path: Path, predictions: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    file = run_dir / "evaluations" / "trained.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"predictions": predictions}))
    for work in (lambda: load_run(run_dir), lambda: compare(file, file)):
        with pytest.raises(UserError, match=r"trained\.json: damaged: .*predictions is no name of a file beside it"):
            work()


@pytest.mark.parametrize("stray", ["evaluations/step-best.json", "evaluations/notes.json", "checkpoints/step-1.bak/x"])
def test_a_stray_name_is_left_alone_or_named(whole: Path, tmp_path: Path, stray: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / stray).parent.mkdir(exist_ok=True)
    (run_dir / stray).write_text("not JSON")
    check_records(run_dir)
    with suppress(UserError):
        load_run(run_dir)


@pytest.mark.parametrize("name", ["evaluations/.partial-test.json", "gap/.partial-gap.json"])
def test_what_a_kill_left_half_written_is_no_result(whole: Path, tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    wanted = replace(load_run(whole), folder=Path())
    (run_dir / name).write_text('{"kind": "eval')
    assert replace(load_run(run_dir), folder=Path()) == wanted


@pytest.mark.parametrize("name", ["slurm-4711.out", "slurm-4711_3.err", "train.log", "job.o123", "logs/4711.out"])
def test_a_log_does_not_make_it_another_folder(tmp_path: Path, name: str) -> None:
    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_steps": 9}, "output_dir": str(tmp_path)}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a line")
    open_run(parse_recipe(raw))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        open_run(parse_recipe(raw))

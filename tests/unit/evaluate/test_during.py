"""Which evaluations a run keeps, and which step is best."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssgen_ds.evaluate.during import TrainingEvaluation, evaluation_file, find_best


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Evaluated after steps 1 to 4: the loss falls, then rises; rougeL is measured once."""
    (tmp_path / "evaluations").mkdir()
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)):
        scores = {"rougeL": {"mean": 0.4}} if step == 3 else {}
        evaluation_file(tmp_path, step).write_text(json.dumps({"loss": loss, "scores": scores}))
        evaluation_file(tmp_path, step).with_suffix(".predictions.jsonl").write_text("{}\n")
    return tmp_path


def test_evaluations_of_steps_that_a_resume_has_undone_are_forgotten(run_dir: Path) -> None:
    recipe = SimpleNamespace(output_dir=str(run_dir), eval=None)
    sampler = SimpleNamespace(world=SimpleNamespace(is_main=True))
    TrainingEvaluation(recipe, None, 0, [], sampler).forget_after(2)
    kept = [f"step-0000000{step}{end}" for step in (1, 2) for end in (".json", ".predictions.jsonl")]
    assert sorted(file.name for file in (run_dir / "evaluations").iterdir()) == kept
    assert find_best(run_dir, "rougeL") is None


def test_the_best_step_is_the_earliest_of_equals(run_dir: Path) -> None:
    best, rouge = find_best(run_dir, "loss"), find_best(run_dir, "rougeL")
    assert (best.step, best.value) == (2, 2.0)
    assert (rouge.step, rouge.value) == (3, 0.4)

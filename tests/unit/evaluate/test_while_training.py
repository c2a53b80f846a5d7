"""Which evaluations a run keeps, and which step is best."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import Packing
from ssgen_ds.evaluate.gold_loss import GoldLoss
from ssgen_ds.evaluate.while_training import TrainingEvaluation
from ssgen_ds.recipe.schema import EvalConfig
from tests.support.alone import alone
from tests.support.report_folder import make_predictions, write_evaluation
from tests.unit.selfgen.test_constant_cost import COUNTERS, mean, transferred


def write(run_dir: Path, step: int, loss: float, means: dict[str, float], **changes: object) -> None:
    """An evaluation of one example, as an earlier version wrote it, without the fingerprint of its examples."""
    scores = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in means.items()}
    predictions = make_predictions(0, 0.5, number=1)
    own = {"step": step, "loss": loss, "scores": scores, **changes}
    write_evaluation(run_dir / "evaluations", f"step-{step:08d}", predictions, **own)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Evaluated after steps 1 to 4: the loss falls, then rises; rougeL is measured once."""
    (tmp_path / "evaluations").mkdir()
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)):
        write(tmp_path, step, loss, {"rougeL": 0.4} if step == 3 else {})
    return tmp_path


def evaluation(run_dir: Path, metric: str | None, **settings: object) -> TrainingEvaluation:
    """Of a run that chooses by `metric`, and evaluates one example."""
    chosen = EvalConfig(best=metric, **{"metrics": ["rouge"], "max_new_tokens": 32, **settings})
    method = SimpleNamespace(rac=SimpleNamespace(correction_cue="again"))
    recipe = SimpleNamespace(output_dir=str(run_dir), eval=chosen, train=SimpleNamespace(seed=0), method=method)
    world = alone()
    example = Example("a", [1], None, [2], truncated=False, gold_text="x")
    blocks = SimpleNamespace(sampler=SimpleNamespace(world=world))
    gold = GoldLoss(None, [], Packing(1), world)
    return TrainingEvaluation(recipe, None, blocks, [example], gold, 1000, None, None)


def best(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "checkpoints" / "best.json").read_text())


def test_evaluations_of_steps_that_a_resume_has_undone_are_forgotten(run_dir: Path) -> None:
    evaluation(run_dir, "loss").forget_after(2)
    kept = [f"step-0000000{step}{end}" for step in (1, 2) for end in (".json", ".predictions.jsonl")]
    assert sorted(file.name for file in (run_dir / "evaluations").iterdir()) == kept
    assert evaluation(run_dir, "rougeL").best.step() is None


def test_the_best_step_is_the_earliest_of_equals(run_dir: Path) -> None:
    (run_dir / "checkpoints").mkdir()
    evaluation(run_dir, "loss").best.publish()
    assert best(run_dir) == {"step": 2, "metric": "loss", "value": 2.0}
    evaluation(run_dir, "rougeL").best.publish()
    assert best(run_dir) == {"step": 3, "metric": "rougeL", "value": 0.4}


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "metric": "loss", "val', "[]", '{"step": "2"}', "\0\0"])
def test_the_best_step_does_not_hang_on_its_file(run_dir: Path, content: str | None) -> None:
    """A kill between a checkpoint and best.json, or a disk that lost it: the evaluations know."""
    (run_dir / "checkpoints").mkdir()
    if content is not None:
        (run_dir / "checkpoints" / "best.json").write_text(content)
    assert evaluation(run_dir, "loss").best.step() == 2
    assert evaluation(run_dir, None).best.step() is None, "nothing to choose by, and nothing chosen before"
    evaluation(run_dir, "loss").best.publish()
    assert best(run_dir)["step"] == 2
    assert evaluation(run_dir, None).best.step() == 2, "eval.best was taken away: what it has kept stays"


def test_a_stray_file_is_no_evaluation(run_dir: Path) -> None:
    for name in ("step-best.json", "step-00000001 (copy).json", "step-3.json"):
        (run_dir / "evaluations" / name).write_text("not even JSON")
    assert evaluation(run_dir, "loss").best.step() == 2
    evaluation(run_dir, "loss").forget_after(0)
    assert (run_dir / "evaluations" / "step-best.json").exists()


def test_numbers_of_other_examples_or_settings_are_not_compared(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`data.eval` and `eval` may change when a run goes on."""
    mine = evaluation(run_dir, "rougeL", max_new_tokens=9)
    settings = {
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "correct": 0,
        "samples": 1,
    }
    for step, score, changes in (
        (5, 0.9, {"examples": "other"}),
        (6, 0.8, {"settings": settings | {"max_new_tokens": 8}}),
        (7, 0.5, {}),
    ):
        same = {"examples": mine.fingerprint, "settings": settings}
        write(run_dir, step, 1.0, {"rougeL": score}, **{**same, **changes})
    assert mine.best.step() == 7
    assert "6 evaluations up to step 6 had other examples or settings" in caplog.text
    assert evaluation(run_dir, "loss", max_new_tokens=9).best.step() == 6, "the loss does not depend on the answers"


@pytest.mark.skipif(not COUNTERS.exists(), reason="reads Linux's counters")
def test_an_evaluation_reads_and_writes_the_same_however_many_there_are(tmp_path: Path) -> None:
    mine, cost = evaluation(tmp_path, "loss", every=1, metrics=[]), []
    for step in range(1, 241):
        before = transferred()
        assert mine.is_due(step)
        mine.make(step, 2.0 + 1 / step, lambda phase: lambda done, total: None)
        assert mine.best.is_at(step) and mine.best.step() == step
        mine.best.publish()
        after = transferred()
        cost.append([after[name] - before[name] for name in ("rchar", "wchar")])
    for early, late in zip(mean(cost[20:60]), mean(cost[-40:]), strict=True):
        assert late < 1.05 * early + 300, (early, late)
    assert len(list((tmp_path / "evaluations").glob("*.json"))) == 240

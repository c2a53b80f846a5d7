"""Where results go: names that show the settings, and no result in the place of another."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.gap_file import find_file, find_folder, gap_identity
from ssgen_ds.evaluate.gap_measure import GapSettings
from ssgen_ds.evaluate.result_file import find_result_file, result_identity
from ssgen_ds.inference.answers import AnswerSettings
from ssgen_ds.inference.model_source import ModelSource
from ssgen_ds.inference.session import InferenceSettings, check_new
from ssgen_ds.recipe.schema import ModelConfig
from ssgen_ds.run.result_names import DEFAULT_METRICS, data_name, metrics_part

METRICS = DEFAULT_METRICS.split(",")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 200 steps."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").touch()
    (run_dir / "finished.json").write_text('{"step": 200}')
    return run_dir


def asked(model: Path, rows: str = "a", data: str = "sets/test.jsonl", **settings: Any) -> Any:
    """What `ssgen evaluate` has opened; `rows` stands for the prompts and gold answers."""
    return SimpleNamespace(
        settings=InferenceSettings(str(model), data, **settings), model_source=ModelSource(ModelConfig(path="base")),
        examples=[1, 2], chat=SimpleNamespace(fingerprint=lambda: "tokenizer"), prompts_fingerprint=rows, cue="again",
    )  # fmt: skip


def place(inference: Any, out: Path | None = None, metrics: list[str] = METRICS, **how: Any) -> Path:
    settings = AnswerSettings(**how)
    return find_result_file(out, inference, settings, metrics, result_identity(inference, settings, metrics, out))


def write(inference: Any, out: Path | None = None, metrics: list[str] = METRICS, **how: Any) -> Path:
    """As an evaluation does at its end."""
    file, settings = place(inference, out, metrics, **how), AnswerSettings(**how)
    content = {
        "kind": "evaluation", "model": inference.settings.model, "data": inference.settings.data, "num_examples": 2,
        "identity": result_identity(inference, settings, metrics, out),
        "settings": {"temperature": settings.temperature},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    file.with_name(f"{file.stem}.predictions.jsonl").write_text("{}\n")
    return file


def test_a_name_shows_what_is_not_the_default(run_dir: Path) -> None:
    assert place(asked(run_dir)) == run_dir / "evaluations" / "test-step200.json"
    sampled = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "samples": 4, "seed": 3, "correct": 1}
    name = "test-step200-correct1-tokens64-temp0.7-topk50-topp0.95-samples4-seed3-first100-prompt512-math+em"
    inference = asked(run_dir, limit=100, max_prompt_tokens=512, batch=4)
    assert place(inference, metrics=["math", "em"], max_new_tokens=64, **sampled).stem == name


def test_names_of_data() -> None:
    names = {
        "a/b/test.jsonl": "test", "/x/test-00000.PARQUET": "test-00000", "data/*.jsonl.gz": "data", "org/set": "set",
        "org/set-v1.0": "set-v1.0", "ä ö.csv": "ä-ö", "*": "data", "...": "data", "d" * 300: "d" * 80,
    }  # fmt: skip
    assert {data: data_name(data) for data in names} == names
    assert len(data_name("ü" * 300).encode()) <= 80
    assert metrics_part(["em", "rouge"]) == "" and metrics_part([]) == "unscored"
    assert metrics_part(["mine:score", "em"]) == "mine-score+em"


def test_the_same_evaluation_has_the_same_file_and_another_one_never(run_dir: Path) -> None:
    """Whatever the path of the data and the order of the metrics; a name cannot say which rows or prompts."""
    first = write(asked(run_dir))
    assert place(asked(run_dir)) == place(asked(run_dir, data="test.jsonl"), metrics=METRICS[::-1]) == first
    others = [write(asked(run_dir, rows)) for rows in ("b", "c")]
    assert len({first, *others}) == 3 and all(file.stem.startswith("test-step200-") for file in others)
    assert [place(asked(run_dir, rows)) for rows in "abc"] == [first, *others]
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert place(asked(moved)).name == first.name


def test_files_of_one_name_in_two_folders(run_dir: Path) -> None:
    write(asked(run_dir, "a", "gsm8k/test.jsonl"))
    other = asked(run_dir, "b", "maths/test.jsonl")
    assert write(other).stem == place(other).stem == "maths-test-step200"
    third = asked(run_dir, "c", "maths/test.jsonl")
    assert place(third).stem.removeprefix("test-step200-").isalnum(), "neither name is free"


def test_other_weights_are_another_step(run_dir: Path) -> None:
    write(asked(run_dir))
    (run_dir / "finished.json").write_text('{"step": 300}')
    assert place(asked(run_dir)).stem == "test-step300"
    checkpoint = run_dir / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    for name in ("COMPLETE", "recipe.yaml"):
        (checkpoint / name).touch()
    state = {"step": 100, "round": 1, "data_fingerprint": "", "tokenizer_fingerprint": "", "world_size": 1}
    (checkpoint / "state.json").write_text(json.dumps(state | {"zero_stage": 0, "packages": {}}))
    inference = asked(checkpoint)
    inference.model_source = replace(inference.model_source, checkpoint=checkpoint)
    assert place(inference) == run_dir / "evaluations" / "test-step100.json"


def test_results_of_earlier_versions_and_of_training_stay(run_dir: Path) -> None:
    (run_dir / "finished.json").unlink()
    (run_dir / "evaluations").mkdir()
    (run_dir / "evaluations" / "test.json").write_text('{"kind": "evaluation"}')
    assert place(asked(run_dir)).stem == "sets-test"
    assert place(asked(run_dir, data="step-00000100.jsonl")).stem != "step-00000100", "only training writes these"
    (run_dir / "evaluations" / "new.json").write_text('{"kind": "eval')
    with pytest.raises(UserError, match=r"evaluations/new\.json: damaged: .*delete it"):
        place(asked(run_dir, data="new.jsonl"))


def test_a_file_that_is_named_is_not_replaced(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.touch()  # as mktemp does
    assert write(asked(run_dir), out) == write(asked(run_dir), out) == out
    with pytest.raises(UserError, match=r"another evaluation \(temperature 0.0 there, 0.5 here\); name another file"):
        place(asked(run_dir), out, temperature=0.5)
    with pytest.raises(UserError, match="of other weights, rows or metrics"):
        place(asked(run_dir, "b"), out)
    for content, problem in (('{"a": 1}', "is no evaluation"), ('{"kind": "evaluation"}', "by an earlier version")):
        out.write_text(content)
        with pytest.raises(UserError, match=problem):
            place(asked(run_dir), out)
        assert out.read_text() == content
    out.unlink()
    with pytest.raises(UserError, match=r"scores\.predictions\.jsonl is there already"):
        place(asked(run_dir), out)
    out.with_name(".scores.partial.jsonl").touch()
    assert place(asked(run_dir), out) == out, "a kill came between the two files"
    for wrong in (tmp_path / "evaluations" / "step-00000100.json", Path("/dev/null"), out.with_suffix(".txt")):
        wrong.parent.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="--out: "):
            place(asked(run_dir), wrong)


def test_a_run_keeps_every_gap_it_has_measured(run_dir: Path, tmp_path: Path) -> None:
    def measure(inference: Any, out: Path | None = None, **settings: Any) -> Path:
        how, own = GapSettings(**settings), (str(run_dir), inference)
        identity = gap_identity([("base", inference), own], how, out)
        file = find_file(find_folder(out, [str(run_dir)]), out, own, how, identity)
        file.write_text(json.dumps({"data": inference.settings.data, "identity": identity}))
        return file

    first = asked(run_dir, limit=256)
    assert measure(first) == measure(first) == run_dir / "gap" / "gap.json"
    assert measure(first, temperature=0.5).name == "test-step200-temp0.5-first256.json"
    assert measure(first, run_dir / "gap") == measure(first) == run_dir / "gap" / "gap.json"
    assert len({measure(asked(run_dir, rows, limit=256)) for rows in "abcb"}) == 3
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    measure(first, elsewhere)
    with pytest.raises(UserError, match=r"--out: .*gap\.json holds another measurement"):
        measure(first, elsewhere, seed=1)


# -- what cannot be written --------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_refused_before_the_model_answers(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only disk tells nothing by its modes, and root may write whatever they say."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    out = tmp_path / "elsewhere"
    for work in (lambda: place(asked(run_dir)), lambda: find_folder(None, [str(run_dir)])):
        with pytest.raises(UserError, match=r"run/\w+ cannot be written \(Read-only.*elsewhere with --out"):
            work()
    for work in (
        lambda: place(asked(run_dir), out.with_suffix(".json")),
        lambda: find_folder(out, [str(run_dir)]),
        lambda: check_new(out.with_suffix(".jsonl")),
    ):
        with pytest.raises(UserError, match=r"--out: .*elsewhere.* cannot be written \(Read-only"):
            work()


def test_generated_answers_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    check_new(out)
    out.touch()
    check_new(out)
    out.write_text("{}\n")
    with pytest.raises(UserError, match="is there already and would be replaced"):
        check_new(out)
    assert out.read_text() == "{}\n" and list(tmp_path.iterdir()) == [out]

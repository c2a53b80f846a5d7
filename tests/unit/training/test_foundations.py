"""What is refused before weights load: every independent problem in one start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.training.foundations import lay_foundations, prepare_inputs
from tests.support.alone import alone
from tests.support.tiny_runs import make_inputs, tiny_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foundations")
    make_inputs(folder)
    return folder


def refusal(folder: Path, **overrides) -> str:
    with pytest.raises(UserError) as refused:
        lay_foundations(tiny_recipe(folder, folder / "run", **overrides), alone())
    return str(refused.value)


def test_every_problem_is_told_in_one_start(folder, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"gradient_clipping": 5.0}))
    told = refusal(
        folder,
        deepspeed=str(own),
        adapter={"kind": "lora", "target_modules": ["nowhere"]},
        eval__metrics=["nowhere:function"],
        data__eval=str(folder / "train.jsonl"),
        data__columns={"prompt": "nowhere"},
        data__max_prompt_tokens=10**6,
        resume=str(tmp_path / "nowhere"),
    )
    messages = (
        f"resume: {tmp_path / 'nowhere'} is neither a checkpoint",
        f"deepspeed: {own} contradicts the recipe\n      - gradient_clipping: 5.0",
        "eval.metrics: nowhere:function: cannot import nowhere",
        "adapter.target_modules:",
        "lower data.max_prompt_tokens",
        "data.train: ",
        "data.eval: ",
    )
    assert [message for message in messages if f"  - {message}" not in told and message not in told] == [], told
    assert not (folder / "run").exists()


def test_without_a_model_the_rest_is_still_told(folder, tmp_path):
    told = refusal(folder, model__path=str(tmp_path), deepspeed="nowhere.json", train__optimizer="adamw")
    assert told.startswith("2 problems\n")
    assert f"model.path: {tmp_path} is no model folder" in told and "deepspeed: no such file: nowhere.json" in told


def test_rows_are_only_sampled_where_something_else_is_wrong(folder, tmp_path, monkeypatch):
    rows = [{"id": str(i), "prompt": "red", "completion": "blue"} for i in range(3)] + [{"id": "x", "prompt": "red"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "rows.jsonl")
    assert "rows.jsonl:4" in refusal(folder, data__train=data)
    monkeypatch.setattr("ssgen_ds.data.datasets.FIRST_ROWS", 3)
    told = refusal(folder, data__train=data, deepspeed="nowhere.json")
    assert told.startswith("deepspeed: no such file"), "the fourth row is looked at in the next start"


def test_preview_tells_everything_as_well(folder):
    recipe = tiny_recipe(folder, folder / "run", data__max_prompt_tokens=10**6, data__columns={"prompt": "nowhere"})
    with pytest.raises(UserError, match=r"(?s)problems.*lower data\.max_prompt_tokens.*data\.train: "):
        prepare_inputs(recipe, alone())

"""What is told before torch is imported: everything at once, and soon."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from ssgen_ds.errors import Problems, UserError
from ssgen_ds.modeling.preflight import recipe_to_read, recipe_to_train
from tests.support.launch import run
from tests.support.tiny_models import save_tiny_model

CPU_SECONDS = 2.0  # of a start that only has to find that a file is missing; it takes about half a second
_TRAIN = """
import sys
from ssgen_ds.errors import UserError
from ssgen_ds.train import train
try:
    train(sys.argv[1], sys.argv[2:])
except UserError as error:
    print(error)
print("imported:", *sorted({"torch", "deepspeed", "transformers", "datasets"} & set(sys.modules)))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "red", "completion": "blue"}) + "\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\n"
        f"train: {{max_steps: 1}}\ndeepspeed: ds_configs/zero2.json\noutput_dir: {tmp_path / 'run'}\n"
    )
    return file


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        recipe_to_train(recipe, list(overrides))
    return str(refused.value)


def test_a_recipe_whose_files_are_there_passes(recipe):
    assert recipe_to_train(recipe, []).output_dir == recipe_to_read(recipe, []).output_dir
    assert not (recipe.parent / "run").exists(), "looking changes nothing"


def test_all_that_is_missing_is_told_in_one_message(recipe, monkeypatch):
    monkeypatch.setattr("ssgen_ds.modeling.quantization.find_spec", lambda name: None)
    monkeypatch.setattr("ssgen_ds.run.logbook.importlib.util.find_spec", lambda name: None)
    wrong = {
        "deepspeed: no such file: nowhere.json": "deepspeed=nowhere.json",
        "model.path: ./nowhere: no such file or folder": "model.path=./nowhere",
        "model.adapter_path: nowhere is no adapter folder": "model.adapter_path=nowhere",
        "data.train: no such file: nowhere.jsonl": "data.train=nowhere.jsonl",
        "data.eval: no file matches nowhere/*.csv": "data.eval=nowhere/*.csv",
        "data.chat_template: no such file: nowhere.jinja": "data.chat_template=nowhere.jinja",
        "train.optimizer=adamw_8bit: the package bitsandbytes is missing": "train.optimizer=adamw_8bit",
        "log.wandb: the package wandb is not installed": "log.wandb=true",
        f"output_dir: {recipe}/run cannot be written to: Not a directory": f"output_dir={recipe}/run",
    }
    told = refusal(recipe, "adapter.kind=lora", *wrong.values())
    assert told.startswith(f"{recipe}: {len(wrong)} problems\n")
    assert [message for message in wrong if f"\n  - {message}" not in told] == []


def test_a_single_problem_is_told_without_a_list(recipe):
    assert refusal(recipe, "data.train=nowhere.jsonl") == "data.train: no such file: nowhere.jsonl"


def test_a_deepspeed_file_is_compared_with_the_recipe(recipe, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"gradient_clipping": 5.0, "bf16": {"enabled": True}}))
    told = refusal(recipe, f"deepspeed={own}")
    assert "gradient_clipping: 5.0, but the recipe gives 1.0" in told
    assert "bf16" not in told, "the device decides that, and only torch knows it"
    assert "bf16.enabled" in refusal(recipe, f"deepspeed={own}", "model.dtype=float32")


def test_a_finished_run_may_have_outlived_its_files(recipe):
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "finished.json").write_text("{}")
    recipe_to_train(recipe, ["data.train=nowhere.jsonl", "model.path=./nowhere"])


def test_a_missing_file_is_told_soon_and_without_torch(recipe):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([sys.executable, "-c", _TRAIN, str(recipe), "data.train=nowhere.jsonl"], timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.stdout == "data.train: no such file: nowhere.jsonl\nimported:\n", done
    assert seconds < CPU_SECONDS, "time of a processor, which other processes on this machine do not change"


def test_problems_are_collected_once_each_and_answers_come_back():
    def refuse(what: str):
        raise UserError(what)

    problems = Problems()
    assert problems.ask(lambda: 3) == 3
    assert problems.ask(lambda: refuse("first")) is None
    inner = Problems(["first", "second\nwith a line below"])
    assert problems.ask(inner.refuse) is None
    assert problems.found == ["first", "second\nwith a line below"]
    with pytest.raises(UserError) as refused:
        problems.refuse("here")
    assert str(refused.value) == "here: 2 problems\n  - first\n  - second\n    with a line below"
    Problems().refuse()

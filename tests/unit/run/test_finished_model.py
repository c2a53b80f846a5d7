"""A run is finished only while its model is there, and what a folder from elsewhere may not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from ssgen_ds.inference.export import export_run
from ssgen_ds.inference.model_source import resolve_model_source
from ssgen_ds.modeling.model_folder import read_notes
from ssgen_ds.recipe.full_paths import with_full_paths
from ssgen_ds.recipe.load import changed_keys, load_recipe
from ssgen_ds.recipe.schema import DataConfig
from ssgen_ds.run import folder as run_folder
from ssgen_ds.run.finished_model import model_problems
from tests.support.tiny_models import save_tiny_model, tiny_tokenizer
from tests.support.tiny_runs import make_inputs, tiny_recipe

OWN = """import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as it is when the run is finished."""
    make_inputs(tmp_path)
    recipe = tiny_recipe(tmp_path, tmp_path / "run", method__name="sft")
    run_folder.start_run(recipe, {})
    save_tiny_model("llama", tmp_path / "run" / "model")
    run_folder.mark_finished(tmp_path / "run", 4)
    return tmp_path / "run"


def as_earlier(run: Path) -> None:
    """finished.json as earlier versions wrote it."""
    (run / "finished.json").write_text('{"step": 4, "time": "t"}')


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "folder": lambda model: shutil.rmtree(model),
    "weights": lambda model: (model / "model.safetensors").unlink(),
    "truncated": lambda model: truncate(model / "model.safetensors"),
    "empty": lambda model: (model / "model.safetensors").write_bytes(b""),
    "config": lambda model: (model / "config.json").unlink(),
}


@pytest.mark.parametrize("earlier", [False, True], ids=["today", "earlier"])
def test_a_whole_model_has_no_problems(run: Path, earlier: bool) -> None:
    if earlier:
        as_earlier(run)
    assert model_problems(run) == []
    assert resolve_model_source(str(run)).model.path == str(run / "model")


@pytest.mark.parametrize("earlier", [False, True], ids=["today", "earlier"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_lost_is_named_and_no_command_takes_the_rest(run: Path, damage: str, earlier: bool) -> None:
    if earlier:
        as_earlier(run)
    DAMAGE[damage](run / "model")
    problems = model_problems(run)
    assert problems and str(run / "model") in problems[0]
    with pytest.raises(UserError, match="its model is not all there, and it has no complete checkpoint"):
        resolve_model_source(str(run))


def test_a_run_is_known_by_full_paths_and_its_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(Path(), "run", model__path="llama", data__chat_template="chat.jinja")
    run_folder.start_run(recipe, {})
    save_tiny_model("llama", tmp_path / "run" / "model")
    run_folder.mark_finished(tmp_path / "run", 4)
    stored = load_recipe("run/recipe.yaml")
    assert stored.model.path == str(tmp_path / "llama") and stored.data.train[0].path == str(tmp_path / "train.jsonl")
    assert changed_keys(with_full_paths(stored), with_full_paths(recipe)) == []
    run_folder.open_run(recipe)  # goes on by the same words
    (tmp_path / "chat.jinja").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model_source = resolve_model_source("../run")
    assert Path(model_source.recipe.data.chat_template).read_text() == "{{ messages }}"
    export_run(Path("../run"), Path("out"), merge=False)
    assert AutoTokenizer.from_pretrained("out").chat_template == "{{ messages }}"


def test_a_run_of_an_earlier_version_goes_on_by_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(Path(), "run", model__path="llama", data__train="train.jsonl")
    run_folder.start_run(recipe, {})
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace(f"{tmp_path}/", ""))
    assert load_recipe(file).model.path == "llama"
    run_folder.open_run(recipe)


@pytest.mark.parametrize("stored", ["/etc/hostname", "~/.netrc", "../secret", "a/../../secret"])
def test_a_folder_from_elsewhere_names_no_file_outside_of_it(run: Path, stored: str) -> None:
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("chat_template: null", f"chat_template: {stored}"))
    with pytest.raises(UserError, match=r"that is not in it: .*copy it to .*chat_template\.jinja"):
        resolve_model_source(str(run))
    (run / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="names a chat template that is not in it"):
        resolve_model_source(str(run))


def test_an_export_takes_no_file_from_outside_along(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (run / "model" / "readme.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="which is not in the run"):
        export_run(run, tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()


def test_only_the_command_line_lets_a_folders_code_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssgen_ds.modeling.load import load_config, load_tokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, model = tmp_path / "the-code-has-run", run / "model"
    (model / "modeling_own.py").write_text(OWN.format(mark=str(mark)))
    config = json.loads((model / "config.json").read_text())
    config.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    (model / "config.json").write_text(json.dumps(config))
    run_folder.mark_finished(run, 4)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    for name in (run, model):
        model_source = resolve_model_source(str(name))
        load_tokenizer(model_source.model)
        with pytest.raises(UserError, match=r"(?s)The model brings code .*--trust-remote-code"):
            load_config(model_source.model)
    assert not mark.exists()
    assert load_config(resolve_model_source(str(run), trust_remote_code=True).model).model_type == "own"
    assert mark.exists()


def test_metrics_that_a_stored_recipe_names_are_not_imported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('imported').touch()\ndef score(*_): return 1\n")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("metrics: []", "metrics: ['planted:score']"))
    recipe.write_text(recipe.read_text().replace("eval_fraction: 0.0", "eval_fraction: 0.5"))
    assert resolve_model_source(str(run)).recipe.eval.metrics == ["planted:score"]
    export_run(run, tmp_path / "out", merge=False)
    assert not (tmp_path / "imported").exists()
    notes = read_notes(str(tmp_path / "out"))
    assert notes is not None and notes.max_prompt_tokens == 48, "an export of an earlier run gets what it lacks"


def test_a_models_template_is_rendered_in_a_sandbox() -> None:
    tokenizer = tiny_tokenizer()
    for escape in ("messages.append.__self__.__class__.__mro__", "messages.clear()"):
        tokenizer.chat_template = "{{ " + escape + " }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        with pytest.raises(UserError, match=r"cannot be rendered: .*(unsafe|not safely callable)"):
            ChatFormat(tokenizer, DataConfig(train=[]))


def test_an_index_that_names_files_elsewhere_is_a_problem(run: Path) -> None:
    as_earlier(run)
    (run / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../llama/model.safetensors"}}'
    )
    (problem,) = model_problems(run)
    assert "names '../../llama/model.safetensors', which is no file of the model's folder" in problem

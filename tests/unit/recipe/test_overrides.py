"""Overrides of the command line: a text takes its text as typed; tildes become the home folder."""

from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from ssgen_ds.cli import app
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.recipe.user_paths import PATH_OPTIONS, expanded, expanded_arguments

GOOD = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "train": {"max_steps": 2}, "output_dir": "r"}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return file


def value(recipe: Recipe, key: str) -> object:
    found: object = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("output_dir", "sweep #1"),
        ("data.system", "42"),
        ("data.system", "no"),
        ("data.system", "1.0"),
        ("data.system", "# rules"),
        ("data.system", "Be brief: one word"),
        ("data.system", " blanks "),
        ("data.system", '"A" or "B"'),
        ("data.prompt", "{question}"),
        ("data.prompt", "Q: {question}"),
        ("data.prompt", "[Q] {question}"),
        ("data.prompt", "{question}\\nAnswer:"),
        ("method.rac.correction_cue", "null"),
        ("log.project", "2024"),
    ],
)
def test_a_text_takes_its_text_as_typed(recipe_file: Path, key: str, text: str) -> None:
    assert value(load_recipe(recipe_file, [f"{key}={text}"]), key) == text


@pytest.mark.parametrize(
    ("override", "key", "wanted"),
    [
        ('data.prompt="{q}\\nAnswer:"', "data.prompt", "{q}\nAnswer:"),
        ("data.system='42'", "data.system", "42"),
        ("data.system=null", "data.system", None),
        ("data.system=", "data.system", None),
        ("data.columns={completion: no, id: 42}", "data.columns", {"completion": "no", "id": "42"}),
        ("data.columns={id: ''}", "data.columns", {"id": ""}),
        ("data.columns.completion=yes", "data.columns", {"completion": "yes"}),
        ("adapter.target_modules=q_proj", "adapter.target_modules", "q_proj"),
        ("adapter.target_modules=[q_proj, 7]", "adapter.target_modules", ["q_proj", "7"]),
        ("train.micro_batch=8", "train.micro_batch", 8),
        ("train.micro_batch=auto", "train.micro_batch", "auto"),
        ("selfgen.block=all", "selfgen.block", "all"),
        ("train.betas=[0.9, 0.95]", "train.betas", (0.9, 0.95)),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("adapter.kind=none", "adapter.kind", "none"),
    ],
)  # fmt: skip
def test_quotes_none_lists_mappings_and_numbers(recipe_file: Path, override: str, key: str, wanted: object) -> None:
    assert value(load_recipe(recipe_file, [override]), key) == wanted


def test_sources_by_override(recipe_file: Path) -> None:
    def sources(text: str) -> list[tuple[str, float]]:
        return [(source.path, source.weight) for source in load_recipe(recipe_file, [f"data.train={text}"]).data.train]

    assert sources("my data #2.jsonl") == [("my data #2.jsonl", 1.0)]
    assert sources("[2024, b.jsonl]") == [("2024", 1.0), ("b.jsonl", 1.0)]
    assert sources("{path: 7.5, weight: 2}") == [("7.5", 2.0)]
    assert sources("[ab]*.jsonl") == [("[ab]*.jsonl", 1.0)]
    (bss,) = [load_recipe(recipe_file, ["method.bss={mix_rate: 0.5, schedule: linear}"]).method.bss]
    assert (bss.mix_rate, bss.schedule) == (0.5, "linear")


def test_a_key_that_stands_twice_is_refused(recipe_file: Path) -> None:
    with pytest.raises(UserError, match="'completion' stands twice"):
        load_recipe(recipe_file, ["data.columns={completion: a, completion: b}"])
    recipe_file.write_text(yaml.safe_dump(GOOD) + "output_dir: other\n")
    with pytest.raises(UserError, match=r"not valid YAML: .*'output_dir' stands twice"):
        load_recipe(recipe_file)


def test_every_path_of_the_recipe_knows_the_home_folder(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["output_dir", "model.path", "model.adapter_path", "data.chat_template", "deepspeed", "resume"]
    recipe = load_recipe(recipe_file, ["adapter.kind=lora", *(f"{key}=~/x" for key in keys), "data.train=~/x"])
    assert {value(recipe, key) for key in keys} == {"/home/me/x"}
    assert recipe.data.train[0].path == "/home/me/x"
    assert expanded("./~x") == "./~x" and expanded("a/~/b") == "a/~/b"
    with pytest.raises(UserError, match=r"output_dir: .*no home folder for '~no-such-user'"):
        load_recipe(recipe_file, ["output_dir=~no-such-user/x"])


def test_every_path_of_the_command_line_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded_arguments(["evaluate", "--model", "~/m", "--data=~/d", "--prompt", "~ {q}", "--prompt=~{q}"]) == [
        "evaluate", "--model", "/home/me/m", "--data=/home/me/d", "--prompt", "~ {q}", "--prompt=~{q}",
    ]  # fmt: skip
    assert expanded_arguments(["export", "~/run", "-n", "~"]) == ["export", "/home/me/run", "-n", "~"]
    paths = {
        f"--{name}"
        for command in app.registered_commands
        for name, kind in get_type_hints(command.callback, include_extras=True).items()
        if ("Path" in repr(kind) and "OptionInfo" in repr(kind)) or name in ("model", "data", "deepspeed", "container")
    }
    assert paths == set(PATH_OPTIONS)


MIXED = [{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"]


@pytest.mark.parametrize(
    ("train", "overrides", "wanted"),
    [
        ("a.jsonl", ["data.train.weight=3"], [("a.jsonl", 3.0)]),
        (["a.jsonl"], ["data.train.weight=3"], [("a.jsonl", 3.0)]),
        ([{"path": "a.jsonl", "weight": 2.0}], ["data.train.path=x.jsonl"], [("x.jsonl", 2.0)]),
        (MIXED, ["data.train=x.jsonl", "data.train.weight=3"], [("x.jsonl", 3.0)]),
        (MIXED, ["data.train=[a.jsonl, {path: x.jsonl, weight: 3}]"], [("a.jsonl", 1.0), ("x.jsonl", 3.0)]),
    ],
)
def test_a_key_of_the_only_source_leaves_its_other_keys(
    recipe_file: Path, train: object, overrides: list[str], wanted: object
) -> None:
    recipe_file.write_text(yaml.safe_dump(GOOD | {"data": {"train": train}}))
    assert [(source.path, source.weight) for source in load_recipe(recipe_file, overrides).data.train] == wanted


@pytest.mark.parametrize("key", ["data.train.path", "data.train.columns.prompt"])
def test_a_key_of_several_sources_names_none_of_them(recipe_file: Path, key: str) -> None:
    recipe_file.write_text(yaml.safe_dump(GOOD | {"data": {"train": MIXED}}))
    with pytest.raises(
        UserError, match=rf"^override {key}: data.train is a list of 2, .* data.train=\[\{{...\}}, ...]"
    ):
        load_recipe(recipe_file, [f"{key}=x"])


def test_a_key_inside_a_value_is_refused(recipe_file: Path) -> None:
    with pytest.raises(
        UserError, match=r"^override train\.max_steps\.x: train\.max_steps is 2 in the recipe, no section"
    ):
        load_recipe(recipe_file, ["train.max_steps.x=1"])
    with pytest.raises(UserError, match=r"adapter\.target_modules is 'all-linear' in the recipe, no section"):
        load_recipe(recipe_file, ["adapter.target_modules=all-linear", "adapter.target_modules.path=1"])

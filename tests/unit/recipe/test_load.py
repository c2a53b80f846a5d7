import copy
from pathlib import Path

import pytest
import yaml

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.load import changed_keys, dump_recipe, load_recipe, parse_recipe
from ssgen_ds.recipe.schema import Recipe

GOOD = {
    "model": {"path": "m"},
    "data": {"train": "a.jsonl"},
    "train": {"max_steps": 2},
    "output_dir": "r",
}


def problems(**sections) -> str:
    raw = copy.deepcopy(GOOD)
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    with pytest.raises(UserError) as caught:
        parse_recipe(raw)
    return str(caught.value)


def test_defaults():
    recipe = parse_recipe(GOOD)
    assert recipe.data.train[0].path == "a.jsonl"
    assert recipe.train.clip == 1.0
    assert recipe.resume == "auto"


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("train", "learning_rat", "train.lr"),
        ("train", "learning_rate", "train.lr"),
        ("train", "max_stps", "train.max_steps"),
        ("train", "per_device_train_batch_size", "train.micro_batch"),
        ("model", "model_name_or_path", "model.path"),
        ("data", "evl", "data.eval"),
        ("selfgen", "refresh_evry", "selfgen.refresh_every"),
    ],
)
def test_unknown_key_names_the_nearest(section, key, hint):
    assert f"{section}.{key}: unknown key; did you mean {hint}?" in problems(**{section: {key: 1}})


def test_unknown_section_and_nested_key():
    message = problems(sefgen={}, method={"bss": {"mixrate": 0.1}})
    assert "sefgen: unknown key; did you mean selfgen?" in message
    assert "method.bss.mixrate: unknown key; did you mean method.bss.mix_rate?" in message


def test_all_problems_at_once_cross_field_ones_included():
    message = problems(
        model={"path": "m", "adapter_path": "x"},
        train={"max_steps": 2, "epochs": 1, "lr": -1},
        eval={"every": 3},
        method={"name": "foo"},
    )
    assert message.startswith("recipe: 5 problems")
    for part in ("train.lr", "method.name", "exactly one of train.epochs", "model.adapter_path", "eval.every"):
        assert part in message


def test_what_is_evaluated_is_checked_before_anything_loads():
    """An unknown metric, a best that is not measured, and nothing to evaluate on."""
    split = {"train": "a.jsonl", "eval_fraction": 0.1}
    assert "eval.metrics: unknown metric 'roug'" in problems(data=split, eval={"metrics": ["roug"]})
    message = problems(data=split, eval={"metrics": ["rouge"], "best": "math"})
    assert "eval.best: 'math' is not measured; there are loss, rouge1, rouge2, rougeL" in message
    message = problems(eval={"metrics": ["em"], "best": "exact_match"})
    assert "eval.metrics: nothing to evaluate on" in message and "eval.best: nothing to evaluate on" in message
    recipe = parse_recipe({**GOOD, "data": split, "eval": {"metrics": ["em", "my.module:metric"], "best": "loss"}})
    assert recipe.generates and not parse_recipe(GOOD).generates


def test_missing_sections_are_all_named():
    with pytest.raises(UserError) as caught:
        parse_recipe({"model": {}, "train": {"max_steps": 1, "epochs": 1}})
    message = str(caught.value)
    for part in ("model.path: required", "data: required", "output_dir: required", "exactly one of"):
        assert part in message


@pytest.mark.parametrize("value", ["alll", 0, -3, 1.5])
def test_block_size(value):
    assert "selfgen.block" in problems(selfgen={"block": value})


def test_one_source_is_a_list_of_one(tmp_path):
    sources = [{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"]
    recipe = parse_recipe({**GOOD, "data": {"train": sources, "eval": "c.jsonl"}})
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.data.eval[0].path == "c.jsonl"


def test_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    recipe = load_recipe(file, ["train.lr=1e-3", "method.name=bss", "method.bss.mix_rate=0.5", "data.train=[x, y]"])
    assert (recipe.train.lr, recipe.method.name, recipe.method.bss.mix_rate) == (1e-3, "bss", 0.5)
    assert len(recipe.data.train) == 2
    for bad in ("train.lr", "=3"):
        with pytest.raises(UserError, match="expected key=value"):
            load_recipe(file, [bad])
    with pytest.raises(UserError, match=r"did you mean train\.lr"):
        load_recipe(file, ["train.lrr=1"])


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\xff"])
def test_file_that_is_no_recipe(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(file)
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "missing.yaml")


def test_dump_is_read_back_unchanged():
    recipe = parse_recipe({**GOOD, "data": {"train": ["a.jsonl"], "columns": {"completion": "x"}}})
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_changed_keys_are_those_that_change_the_training():
    recipe = parse_recipe(GOOD)

    def changed(**sections) -> list[str]:
        return changed_keys(recipe, parse_recipe({**copy.deepcopy(GOOD), **sections}))

    assert changed(train={"max_steps": 2, "lr": 1e-3}) == ["train.lr: 1e-05 -> 0.001"]
    assert changed(data={"train": "b.jsonl"})[0].startswith("data.train")
    assert changed(train={"max_steps": 2, "micro_batch": 9}, checkpoint={"every": 3}, output_dir="q") == []


RECIPES = sorted(Path("recipes").rglob("*.yaml"))


def test_recipes_are_found():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_shipped_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.output_dir.startswith("runs/")

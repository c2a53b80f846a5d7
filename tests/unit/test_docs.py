"""What the pages in docs/ say is compared with the program: keys, messages, links, examples."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from ssgen_ds.data.datasets import build_datasets
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.recipe.load import may_change, parse_recipe
from tests.support.recipe_keys import recipe_keys
from tests.unit.data.helpers import CHATML, byte_tokenizer

DOCS = Path("docs")
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("CHANGELOG.md"), *sorted(DOCS.glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The contents of the page's code fences in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def table_rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page, headings and rulers included."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def headings(page: Path) -> list[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_key_of_a_recipe_is_explained_with_its_type_and_default():
    rows = {cells[0].strip("`"): cells for cells in table_rows("recipe.md") if cells[0].startswith("`")}
    keys = {key: (kind, default) for key, kind, default in recipe_keys()}
    wrong = [
        f"| `{key}` | {kind} | {default} | what it means |"
        for key, (kind, default) in keys.items()
        if key not in rows or rows[key][1:3] != [kind, default] or not rows[key][3]
    ]
    assert not wrong, "docs/recipe.md should have these rows:\n" + "\n".join(wrong)
    assert rows.keys() == keys.keys(), "docs/recipe.md explains keys that there are not"


def test_the_keys_that_may_change_when_a_run_goes_on():
    (listed,) = re.findall(r"refused by name:\n(.*?)\n\n", (DOCS / "recipe.md").read_text(encoding="utf-8"), re.DOTALL)
    names = re.findall(r"`([^`]+)`", listed)
    keys = [key for key, _, _ in recipe_keys()]
    said = {
        key for key in keys if any(key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in names)
    }
    assert said == {key for key in keys if may_change(key)}


def test_the_smallest_recipe_is_one():
    (smallest,) = blocks("recipe.md", "yaml")
    assert parse_recipe(yaml.safe_load(smallest)).train.epochs == 1


# What each recipe of docs/data.md reads, in its order: examples of an epoch, and what else is to be counted.
READ = [
    (2, {}),
    (2, {}),
    (2, {}),
    None,  # from the hub
    (2 * 2 + 1 + 2, {"train_examples": 6}),
    (2, {"eval_examples": 2}),
    (1, {"bad_rows": 2}),
    (3, {"streaming": True}),
]


def write_files(page: str, folder: Path) -> None:
    """The files that a page shows, each under the name that was last said before it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for shown in re.finditer(r"```(?:jsonl|csv)\n(.*?)```", text, re.DOTALL):
        name = re.findall(r"`(data/\w+\.\w+)`", text[: shown.start()])[-1]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(shown[1], encoding="utf-8")


def test_the_data_examples_are_read(tmp_path, monkeypatch):
    recipes = blocks("data.md", "yaml")
    write_files("data.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    chatml = byte_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>")
    assert len(recipes) == len(READ)
    for number, (text, expected) in enumerate(zip(recipes, READ, strict=True)):
        given = yaml.safe_load(text)
        train = {"global_batch": 3, **given.get("train", {"epochs": 1})}
        recipe = parse_recipe({"model": {"path": "m"}, "output_dir": "r", **given, "train": train})
        if expected is None:
            assert "/" in recipe.data.train[0].path
            continue
        read = build_datasets(recipe, ChatFormat(chatml, recipe.data), tmp_path / f"cache{number}")
        examples = len(read.plan.batch(1)) if recipe.data.streaming else read.plan.examples_per_epoch
        assert examples == expected[0]
        assert read.summary.items() >= expected[1].items()
        assert all(item.example.response_ids[-1] == chatml.eos_token_id for item in read.plan.batch(1))


def test_the_costs_in_the_tuning_guide_are_those_that_were_measured():
    results = Path("bench/results")
    selfgen = json.loads((results / "selfgen-smollm2.json").read_text())["rows"]
    steps = json.loads((results / "train-smollm2.json").read_text())["rows"]

    def at_both_rates(row: str) -> list[str]:
        return [f"{selfgen[row]['ours'][rate]:.3g}" for rate in ("0.1", "0.25")]

    measured = {
        "whole BSS step against an SFT step, XSum": ["", f"{steps['T2']['ratio']['XSum']:.2f}x"],
        "whole BSS step against an SFT step, FiQA": ["", f"{steps['T2']['ratio']['FiQA']:.2f}x"],
        "calls for 8 contexts of 128 tokens": at_both_rates("S1"),
        "seconds for them, one process": at_both_rates("S3"),
        "seconds for them, two ranks": at_both_rates("S4"),
    }
    rows = table_rows("tuning.md")
    for what, cells in measured.items():
        assert [row[1:] for row in rows if row[0].startswith(what)] == [cells], what
    text = " ".join((DOCS / "tuning.md").read_text(encoding="utf-8").split())
    growth = [steps["T4"]["ours"][f"calls at T={length}"] for length in (64, 256, 1024)]
    assert "{}, {} and {} of them for 64, 256 and 1024 tokens".format(*growth) in text
    at_128 = {row["mix_rate"]: row["passes"] for row in selfgen["S1"]["details"]["passes"] if row["num_tokens"] == 128}
    passes = [f"{at_128[rate]:.3g}" for rate in (0.1, 0.25, 0.5)]
    assert "{}, {} and {} passes at .1, .25 and .5 over 128 tokens".format(*passes) in text
    drafts = [f"{selfgen['S5']['ours'][strategy]:.3g}" for strategy in ("gathered", "sharded")]
    assert "{} tokens a second on two ranks where the model is gathered, {} where".format(*drafts) in text


def test_the_pages_say_of_quality_what_the_studies_found():
    results, rows = Path("bench/results"), (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    tasks = json.loads((results / "study-controlled.json").read_text())["tasks"]
    expected = []
    for task in ("reverse", "sort", "sums"):
        sft, bss = (tasks[task][method] for method in ("sft", "bss .1 constant"))
        found = bss["versus_sft"]["greedy"]
        means = [one["answers"]["greedy"]["mean"] for one in (sft, bss)]
        numbers = [f"{100 * value:.1f}" for value in means]
        change = [f"{100 * found[key]:+.1f}" for key in ("mean", "low", "high")]
        expected.append(f"| {numbers[0]} | {numbers[1]} | {change[0]} [{change[1]}, {change[2]}] |")
    real = {row["title"]: row for row in json.loads((results / "study-smollm2.json").read_text())["rows"]}
    bss = real["BSS, mix rate .1"]
    change = [f"{bss['against_sft'][key]:+.3f}" for key in ("mean", "low", "high")]
    numbers = [f"{row['rougeL']['mean']:.3f}" for row in (real["SFT"], bss)]
    expected.append(f"| {numbers[0]} | {numbers[1]} | {change[0]} [{change[1]}, {change[2]}] |")
    for line in expected:
        assert any(row.endswith(line) for row in rows), f"docs/results.md should say: {line}"
    said = " ".join(Path("README.md").read_text(encoding="utf-8").split())
    interval = f"{change[0]} with a 95 % interval of [{change[1]}, {change[2]}]"
    assert f"{numbers[0]} with SFT, {numbers[1]} with BSS, a difference of {interval}" in said


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_point_to_files(page):
    """And to headings in them, under the names that GitHub gives to headings."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    dead = []
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if not re.match(r"https?:", link) and not (target.exists() and (not heading or heading in headings(target))):
            dead.append(link)
    assert dead == []


def texts_in_the_source() -> list[str]:
    """Every string of the package, as one would read it: `...` for what is filled in, pieces put together."""
    found = []
    for file in Path("ssgen_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_error_index_is_one_of_the_programs():
    messages = [cells[0] for cells in table_rows("errors.md") if cells[0].startswith("`")]
    assert len(messages) > 100
    texts = texts_in_the_source()
    gone = [message for message in messages if not any(message.strip("`. ") in text for text in texts)]
    assert not gone, "docs/errors.md has messages that the program no longer gives:\n" + "\n".join(gone)

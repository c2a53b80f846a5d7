"""The recipes for the paper's tasks: marked as not run, fit for the rows of their data sets, with true shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ssgen_ds.data.records import RecordMaker
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.plan.run import Hardware, plan_recipe
from ssgen_ds.plan.sizes import find_config
from ssgen_ds.recipe.load import load_recipe
from tests.support.tiny_models import tiny_tokenizer

PAPER = sorted(Path("recipes/paper").rglob("*.yaml"))
TEMPLATES = sorted(Path("recipes").rglob("*.jinja"))
# A row with the columns that each data set has on the hub, and the prompt and the end of the answer made from it.
ROWS = {
    "trl-lib/tldr": ({"prompt": "POST: p\n\nTL;DR:", "completion": " sum"}, "POST: p\n\nTL;DR:", " sum</s>"),
    "HuggingFaceH4/ultrachat_200k": (
        {
            "prompt": "q",
            "prompt_id": "0f",
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "b"},
            ],
        },
        "<s><|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\n",
        "b</s>",
    ),
    "openai/gsm8k": (
        {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        "<s><|user|>\n1+1?</s>\n<|assistant|>\n",
        "1+1=<<1+1=2>>2\n#### 2</s>",
    ),
    "DigitalLearningGmbH/MATH-lighteval": (
        {"problem": "$1+1$?", "level": "Level 1", "solution": "\\boxed{2}", "type": "Algebra"},
        "<s><|user|>\n$1+1$?</s>\n<|assistant|>\n",
        "\\boxed{2}</s>",
    ),
}
# As published with the models (Pythia: Biderman et al. 2023, table 1).
PARAMETERS = {
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "EleutherAI/pythia-2.8b-deduped": 2_775_208_960,
    "EleutherAI/pythia-6.9b-deduped": 6_857_302_016,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


def test_they_are_found():
    assert len(PAPER) == 8
    assert [path.name for path in TEMPLATES] == ["chat.jinja", "tldr.jinja"]
    shapes = {path.stem.replace("--", "/") for path in Path("ssgen_ds/plan/shapes").iterdir()}
    assert shapes == PARAMETERS.keys()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_each_says_that_it_was_not_run_and_names_where_its_values_come_from(path):
    lines = path.read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert lines[0].startswith("# NOT RUN HERE")
    assert "From the paper:" in comment and "Ours:" in comment
    assert f"ssgen_ds.train {path}" in comment
    recipe = load_recipe(path)
    task, method = path.stem.split("_")
    assert recipe.method.name == method
    assert recipe.output_dir == f"runs/paper/{task}_{method}"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_row_of_its_data_set_becomes_an_example(path):
    recipe = load_recipe(path)
    tokenizer = tiny_tokenizer(98)
    tokenizer.add_tokens("\n")
    chat = ChatFormat(tokenizer, recipe.data)
    for source in [*recipe.data.train, *recipe.data.eval]:
        row, prompt, answer = ROWS[source.path]
        example = chat.encode(RecordMaker(source, recipe.data, "data.train")("row 1", row))
        assert (chat.decode(example.prompt_ids), chat.decode(example.response_ids)) == (prompt, answer)
    correction = chat.decode(chat.correction_ids("Correct it."))
    assert correction.startswith("</s>") and "Correct it." in correction
    assert correction.endswith("TL;DR:" if path.stem.startswith("tldr") else "<|assistant|>\n")


@pytest.mark.parametrize("model", PARAMETERS)
def test_shapes_have_as_many_parameters_as_published(model):
    recipe = load_recipe(PAPER[0], [f"model.path={model}"])
    config, where = find_config(recipe)
    assert "shape shipped with ssgen" in where
    with init_empty_weights():
        parameters = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict())).num_parameters()
    assert parameters == PARAMETERS[model]


def test_the_page_about_them_has_their_models_data_and_planned_peaks():
    page = Path("docs/paper.md").read_text()
    rows = {cells[0]: cells for cells in (re.findall(r"[^|]+", line) for line in page.splitlines()) if len(cells) == 4}
    hardware = Hardware(8, 1, 80e9, "", False)
    for path in PAPER:
        recipe = load_recipe(path)
        _, model, data, peak = rows[f" [{path.stem}](../{path}) "]
        assert recipe.model.path.endswith(f"/{model.strip()}")
        assert data.strip() == "the same" or f"`{recipe.data.train[0].path}`" in data
        assert peak.strip() == f"{plan_recipe(recipe, hardware)[0].highest / GIB:.1f} GiB"
    two_runs = [line.split()[2:] for line in page.splitlines() if line.strip().startswith("... recipes/")]
    assert [load_recipe(PAPER[0], overrides).method.name for overrides in two_runs] == ["sft", "bss"]

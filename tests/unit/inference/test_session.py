"""Which data settings a model answers by: the run's own, replaced by what was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from ssgen_ds.inference.model_source import ModelSource
from ssgen_ds.inference.session import Inference, InferenceSettings, data_config
from ssgen_ds.modeling.model_folder import Notes
from ssgen_ds.modeling.positions import context_problems
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import DataConfig, ModelConfig
from tests.unit.data.helpers import CHATML, byte_tokenizer
from tests.unit.data.helpers import data_config as data_of_tests
from tests.unit.data.test_tokenize import record


def trained(**changes: object) -> DataConfig:
    source = {"path": "a.jsonl", "columns": {"completion": "summary", "id": "key"}, "prompt": "Short: {text}"}
    return DataConfig.model_validate({"train": [source], "max_prompt_tokens": 96, **changes})


def test_a_run_brings_its_columns_prompt_and_cut() -> None:
    data = data_config(InferenceSettings("run", "b.jsonl"), trained(over_length="error"))
    (source,) = data.train
    assert (source.path, source.prompt, source.columns) == (
        "b.jsonl",
        "Short: {text}",
        {"completion": "summary", "id": "key"},
    )
    assert (data.max_prompt_tokens, data.over_length, data.eval) == (96, "truncate", [])


def test_what_is_asked_for_replaces_them() -> None:
    settings = InferenceSettings("run", "b.jsonl", prompt="{q}", reference_column="answer", max_prompt_tokens=40)
    data = data_config(settings, trained())
    assert data.train[0].prompt == "{q}" and data.train[0].columns == {"completion": "answer", "id": "key"}
    assert data.max_prompt_tokens == 40


def test_a_model_without_a_run_is_cut_as_asked() -> None:
    assert data_config(InferenceSettings("m", "b.jsonl", max_prompt_tokens=96), None).max_prompt_tokens == 96
    assert data_config(InferenceSettings("m", "b.jsonl"), None) == DataConfig(
        train=[{"path": "b.jsonl"}], over_length="truncate", loss_on="last"
    )


@pytest.fixture
def marked() -> ChatFormat:
    """Its tokenizer has a marker that the model has no row for."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<|mark|>"], CHATML, eos_token="<|im_end|>")
    return ChatFormat(tokenizer, data_of_tests(), embedding_rows=tokenizer.convert_tokens_to_ids("<|mark|>"))


def test_a_cue_that_the_model_cannot_read_is_refused_before_it_answers(marked: ChatFormat) -> None:
    model_source = ModelSource(ModelConfig(path="m"), notes=Notes(correction_cue="Mind <|mark|>."))
    examples, config = [marked.encode(record("a", "b"))], SimpleNamespace(max_position_embeddings=512)
    settings = InferenceSettings("m", "d.jsonl")
    inference = Inference(settings, None, model_source, {}, marked.data, marked, config, examples, [("b",)])
    inference.check_lengths(8, correct=0)
    with pytest.raises(UserError, match=r"--correct: the correction cue 'Mind <\|mark\|>\.': the token '<\|mark\|>' "):
        inference.check_lengths(8, correct=1)


def test_so_it_is_before_training_where_only_the_evaluation_corrects(marked: ChatFormat) -> None:
    def problems(**evaluation: object) -> list[str]:
        raw = {"model": {"path": "m"}, "data": {"train": "d", "eval": "e"}, "train": {"max_steps": 1}}
        method = {"name": "sft", "rac": {"correction_cue": "Mind <|mark|>."}}
        recipe = parse_recipe(raw | {"output_dir": "o", "method": method, "eval": evaluation})
        return context_problems(recipe, marked, SimpleNamespace(max_position_embeddings=4096))

    assert problems(metrics=["em"]) == problems(correct=1) == []
    (problem,) = problems(metrics=["em"], correct=1)
    assert problem.startswith("method.rac.correction_cue: the token '<|mark|>'")

"""Which data settings a model answers by: the run's own, replaced by what was asked for."""

from __future__ import annotations

from ssgen_ds.config import DataConfig
from ssgen_ds.inference import InferenceSettings, data_config


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
    settings = InferenceSettings("run", "b.jsonl", prompt="{q}", reference="answer", max_prompt_tokens=40)
    data = data_config(settings, trained())
    assert data.train[0].prompt == "{q}" and data.train[0].columns == {"completion": "answer", "id": "key"}
    assert data.max_prompt_tokens == 40


def test_a_model_without_a_run_is_cut_as_asked() -> None:
    assert data_config(InferenceSettings("m", "b.jsonl", max_prompt_tokens=96), None).max_prompt_tokens == 96
    assert data_config(InferenceSettings("m", "b.jsonl"), None) == DataConfig(
        train=[{"path": "b.jsonl"}], over_length="truncate", loss_on="last"
    )

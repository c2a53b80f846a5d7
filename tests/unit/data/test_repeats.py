"""Equal rows: noise of their own, whatever the order of rows, files and sources; a single row keeps its id."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ssgen_ds.data.datasets import read_questions
from ssgen_ds.data.plan import StepPlan
from ssgen_ds.data.repeats import RepeatCounter, numbered, repeat_numbers
from ssgen_ds.data.store import Store, build_store, split_store
from ssgen_ds.data.store_writer import ROWS_PER_BATCH
from ssgen_ds.data.stream import StreamPlan
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.compare import _read_predictions, _refuse_other_examples
from ssgen_ds.inference.answers import AnswerSettings
from ssgen_ds.recipe.schema import SourceConfig
from tests.unit.data.helpers import data_config

ROW = {"prompt": "q", "completion": "a"}
OTHER = {"prompt": "q", "completion": "b"}


@pytest.fixture
def build(chatml, tmp_path: Path):
    def build(*sources: Path | SourceConfig, **settings: object) -> Store:
        data = data_config(*sources, **settings)
        return build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")

    return build


def ids(examples) -> list[str]:
    return [example.id for example in examples]


def test_numbers_of_keys() -> None:
    keys = np.array([5, 0, 5, 2**64 - 1, 5, 0], np.uint64)
    assert repeat_numbers(keys).tolist() == [1, 1, 2, 1, 3, 2]
    assert repeat_numbers(keys[:0]).tolist() == []
    assert numbered("abaa") == ["a", "b", "a#2", "a#3"] == numbered(numbered("abaa"))


def test_a_counter_forgets_what_lies_far_back() -> None:
    counter = RepeatCounter(window=2)
    assert [counter(key) for key in "aabcb"] == [1, 2, 1, 1, 2]
    assert counter("a") == 1, "forgotten"
    assert counter("c") == 1, "b was the later one"


def test_equal_rows_have_ids_of_their_own_in_any_order(build, write_jsonl) -> None:
    (single,) = ids(build(write_jsonl([ROW], "single.jsonl")))
    store = build(write_jsonl([ROW, OTHER, ROW, ROW], "rows.jsonl"))
    other = store[1].id
    assert ids(store) == [single, other, f"{single}#2", f"{single}#3"]
    assert len({tuple(example.prompt_ids + example.response_ids) for example in store}) == 2, "the tokens stay"
    assert set(ids(build(write_jsonl([ROW, ROW, OTHER, ROW], "order.jsonl")))) == set(ids(store))
    files = build(write_jsonl([ROW, OTHER], "one.jsonl"), write_jsonl([ROW, ROW], "two.jsonl"))
    assert set(ids(files)) == set(ids(store)), "a row of two sources"
    given = build(write_jsonl([ROW | {"id": 7}, ROW | {"id": 7}, OTHER | {"id": 8}], "given.jsonl"))
    assert ids(given) == ["7", "7#2", "8"]


def test_rows_far_apart_and_what_lies_between(build, write_jsonl) -> None:
    """Over several batches of the file."""
    rows = [{"prompt": f"q{i}", "completion": "a", "id": f"n{i}"} for i in range(2 * ROWS_PER_BATCH)]
    store = build(write_jsonl([*rows, rows[3], rows[300], rows[3]]))
    expected = [row["id"] for row in rows] + ["n3#2", "n300#2", "n3#3"]
    assert ids(store) == expected
    assert store.where(len(store) - 1).endswith(f":{len(store)}")


def test_rows_that_only_a_cut_makes_equal_are_not_repeats(build, write_jsonl) -> None:
    rows = [{"prompt": "q", "completion": f"aaaa{end}"} for end in "xyy"]
    store = build(write_jsonl(rows), max_response_tokens=3)
    assert len({tuple(example.response_ids) for example in store}) == 1
    assert len(set(ids(store))) == 3 and [("#" in name) for name in ids(store)] == [False, False, True]


def test_an_old_run_goes_on(build, write_jsonl) -> None:
    """Data fingerprints are those of before equal rows had ids of their own, with equal rows and without."""
    assert build(write_jsonl([ROW, OTHER], "a.jsonl")).fingerprint == "1277330f89bcd025d27315e0165cef0b"
    assert build(write_jsonl([ROW, OTHER, ROW], "b.jsonl")).fingerprint == "8b32cbd8210e0b93e50dc11d907d6dbf"


def test_a_row_that_has_the_id_of_a_repeat(build, write_jsonl) -> None:
    rows = [ROW | {"id": "x"}, ROW | {"id": "x"}, OTHER | {"id": "x#2"}]
    with pytest.raises(UserError, match=r"train\.jsonl:2 repeats the id 'x' and would be 'x#2'"):
        build(write_jsonl(rows))


def test_a_split_keeps_equal_rows_on_one_side(build, write_jsonl) -> None:
    rows = [{"prompt": f"q{i % 50}", "completion": "a"} for i in range(100)]
    train, evaluation = split_store(build(write_jsonl(rows)), 0.3)
    sides = [{name.partition("#")[0] for name in ids(side)} for side in (train, evaluation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(set(ids(train))) == len(train) and len(set(ids(evaluation))) == len(evaluation)


def test_each_visit_of_a_plan_has_a_key_of_its_own(build, write_jsonl) -> None:
    sources = [SourceConfig(path=str(write_jsonl([ROW, ROW, OTHER], f"{n}.jsonl")), weight=n) for n in (1, 2)]
    plan = StepPlan(build(*sources), seed=0, global_batch=4)
    visits = [(i.example.id, i.visit) for step in range(1, 3 * plan.steps_per_epoch + 1) for i in plan.batch(step)]
    assert len(set(visits)) == len(visits)


def test_streams(chatml, write_jsonl) -> None:
    file = write_jsonl([ROW, OTHER, ROW, ROW])
    data = data_config(file, SourceConfig(path=str(file)), streaming=True)

    def visits(steps: range) -> list[tuple[str, int]]:
        plan = StreamPlan(data.train, data, ChatFormat(chatml, data), seed=0, global_batch=4, buffer_examples=4)
        return [(item.example.id, item.visit) for step in steps for item in plan.batch(step)]

    forward = visits(range(1, 13))
    assert len(set(forward)) == len(forward)
    assert visits(range(10, 13)) == forward[36:], "a resume reads up to where it was"
    assert len({name for name, _ in forward if "#" not in name}) == 2, "the first of each keeps its id"


def test_questions_and_their_pairs(chatml, write_jsonl, tmp_path: Path) -> None:
    """Evaluations of before pair with those of today."""
    data = data_config(write_jsonl([ROW, ROW, OTHER]))
    examples, gold_texts = read_questions(data, ChatFormat(chatml, data))
    one, two, three = ids(examples)
    assert (two, "#" in three) == (f"{one}#2", False)
    assert gold_texts == [("a",), ("a",), ("b",)]

    def predictions(name: str, names: list[str]) -> list[dict]:
        answer = {"prompt": "p", "references": ["a"], "prediction": "a", "turns": ["a"], "stopped": True}
        answer |= {"num_tokens": 1, "reference_tokens": 1, "scores": {"f1": 1.0}, "first_scores": {"f1": 1.0}}
        rows = [{"index": i, "id": names[i], "sample": s, **answer} for i in range(3) for s in range(2)]
        (tmp_path / f"{name}.predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {"predictions": f"{name}.predictions.jsonl", "scores": {}, "correction": None}
        content |= {"kind": "evaluation", "model": "m", "data": "d", "step": None, "num_examples": 3}
        content |= {
            "behaviour": dict.fromkeys(["eos_rate", "length_ratio", "repetition", "empty_rate", "mean_tokens"], 1.0)
        }
        content |= {"settings": {**asdict(AnswerSettings(8)), "samples": 2}}
        return _read_predictions(tmp_path / f"{name}.json", content)

    before, after = predictions("before", [one, one, three]), predictions("after", [one, two, three])
    assert before == after
    _refuse_other_examples(tmp_path / "before.json", tmp_path / "after.json", before, after)

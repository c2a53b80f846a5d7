"""Rows of every shape become messages that end in the response; whatever cannot is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import BadRows, Record, RecordMaker, content_hash, parse_template, render_template
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import SourceConfig
from tests.unit.data.helpers import data_config

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def make(row: dict, needs_response: bool = True, source: dict | None = None, **data: object) -> Record:
    entry = SourceConfig(path="x.jsonl", **(source or {}))
    return RecordMaker(entry, data_config(entry, **data), "data.train", needs_response)("x.jsonl:1", row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"messages": [USER, ANSWER | {"name": None}]},
        {"messages": [USER, ANSWER], "prompt": "as in ultrachat"},
    ],
)
def test_forms_mean_the_same(row: dict) -> None:
    record = make(row)
    assert record.messages == [USER, ANSWER]
    assert record.id == record.content_hash == content_hash([USER, ANSWER])
    assert len(record.id) == 24


def test_columns_and_template() -> None:
    row = {"doc": "{x} }{", "n": 3, "gold": "a", "key": 7}
    record = make(row, columns={"completion": "gold", "id": "key"}, prompt="{{sum}} {n}: {doc}")
    assert record.messages[0]["content"] == "{sum} 3: {x} }{"
    assert record.id == "7"


def test_source_beats_data() -> None:
    row = {"q": "own", "p": "data's", "a": "x", "m": [USER, ANSWER]}
    shared = {"columns": {"completion": "a"}, "prompt": "{p}"}
    assert make(row, **shared).messages[0]["content"] == "data's"
    assert make(row, source={"prompt": "{q}!"}, **shared).messages[0]["content"] == "own!"
    assert make(row, source={"columns": {"prompt": "q"}}, **shared).messages[0]["content"] == "own"
    assert make(row, source={"columns": {"messages": "m"}}, **shared).messages == [USER, ANSWER]


def test_system_is_added_only_where_there_is_none() -> None:
    own = {"role": "system", "content": "mine"}
    assert make({"messages": [USER, ANSWER]}, system="s").messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert make({"messages": [own, USER, ANSWER]}, system="s").messages == [own, USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "completion": " \n"}, "the response is empty"),
        ({"prompt": "q", "completion": None}, "column 'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"prompt": 3, "completion": "a"}, "the prompt must be text or a list of messages, got int"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages must be a list, got str"),
        ({"messages": [USER]}, "the last message must be the assistant's, got 'user'"),
        ({"messages": [ANSWER]}, "no prompt: there is no user message before the response"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "message 2: unknown role 'bot'"),
        ({"messages": [USER, {"from": "gpt"}]}, "message 2 must be an object with `role` and `content`"),
        ({"messages": [USER, ANSWER | {"content": ["a"]}]}, "message 2: content must be text, got list"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, "the response is empty"),
        ({"messages": [USER, ANSWER, USER | {"content": " "}, ANSWER]}, "message 3 is empty"),
        ({"prompt": "q", "completion": "\ud800"}, "not valid Unicode"),
        ({"prompt": "q", "completion": "a", "id": 1.5}, "the id must be text or a whole number, got float"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: dict, what: str) -> None:
    with pytest.raises(BadRow) as caught:
        make(row)
    assert what in str(caught.value)


def test_a_column_missing_from_the_first_row_is_the_recipes_fault_later_the_rows() -> None:
    source = SourceConfig(path="x.jsonl", columns={"completion": "a"}, prompt="{documnt}")
    maker = RecordMaker(source, data_config(source, on_bad_row="skip"), "data.train")
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*'documnt'.*the row's columns are: document, a"):
        maker("x.jsonl:1", {"document": "d", "a": "b"})
    maker("x.jsonl:2", {"documnt": "d", "a": "b"})
    with pytest.raises(BadRow, match="'documnt'"):
        maker("x.jsonl:3", {"document": "d", "a": "b"})
    with pytest.raises(UserError, match="neither `messages` nor `prompt` and `completion`"):
        make({"question": "q", "answer": "a"})


@pytest.mark.parametrize("template", ["no column", "{a", "{a!r}", "{a:>5}"])
def test_bad_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="prompt template"):
        parse_template(template, "data")


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [({"messages": "m", "prompt": "p"}, None), ({"messages": "m"}, "{q}"), ({"prompt": "p"}, "{q}")],
)
def test_contradictory_columns_are_refused(columns: dict, prompt: str | None) -> None:
    with pytest.raises(UserError, match="give either"):
        make({"q": "q"}, columns=columns, prompt=prompt)


def test_ids() -> None:
    row = {"prompt": "q", "completion": "a", "id": "mine"}
    assert make(row).id == "mine"
    assert make(row, columns={"id": ""}).id == make(row).content_hash
    assert make(row | {"id": None}).id == make(row).content_hash
    with pytest.raises(BadRow, match="no id in the column 'id'"):
        make(row | {"id": None}, columns={"id": "id"})


def test_prompts_to_answer_need_no_response() -> None:
    nothing = {"role": "assistant", "content": ""}
    for row in ({"prompt": "q"}, {"prompt": "q", "completion": None}, {"messages": [USER]}):
        assert make(row, needs_response=False).messages == [USER, nothing]
    assert make({"prompt": "q", "completion": "a"}, needs_response=False).messages == [USER, ANSWER]


def test_bad_row_error_lists_twenty_and_the_total() -> None:
    bad = BadRows()
    for line in range(1, 26):
        bad.add(f"f:{line}", BadRow("oops"))
    message = str(bad.error("data.train"))
    assert message.startswith("data.train: 25 bad rows")
    assert "f:20: oops" in message and "f:21" not in message and "... and 5 more" in message


@given(st.text(), st.text())
def test_template_leaves_data_alone(first: str, second: str) -> None:
    pieces = parse_template("<{a}|{b}>", "data")
    assert render_template(pieces, {"a": first, "b": second}) == f"<{first}|{second}>"


@given(st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True))
def test_content_hash_tells_contents_apart(texts: list[str]) -> None:
    texts = [text.encode(errors="replace").decode() + str(i) for i, text in enumerate(texts)]
    assert len({content_hash([{"role": "user", "content": text}]) for text in texts}) == len(texts)

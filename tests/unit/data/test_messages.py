"""Messages by hand: what goes on to the chat template, what is added, and what is refused with which words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.data.messages import check_json, check_messages, extra_fields, message, says_something, valid_text

USER, ANSWER = message("user", "q"), message("assistant", "a")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}


def test_null_and_ignored_fields_are_taken_off_and_the_given_messages_stay() -> None:
    given_user = {**USER, "name": None, "weight": 0}
    given_answer = {**ANSWER, "reasoning_content": "r", "score": 2}
    assert check_messages([given_user, given_answer], ignored=("score",)) == [
        {**USER, "weight": 0},
        {**ANSWER, "reasoning_content": "r"},
    ]
    assert given_user["name"] is None and given_answer["score"] == 2


def test_a_turn_that_only_calls_tools_has_an_empty_content() -> None:
    """A null content is an empty one beside tool calls, and nowhere else."""
    expected = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert check_messages([USER, CALL]) == [USER, expected], "the call is the response"
    with pytest.raises(BadRow, match="message 2 must be an object with `role` and `content`"):
        check_messages([USER, {**CALL, "tool_calls": []}])


@pytest.mark.parametrize("last", [USER, message("tool", "3")])
def test_a_response_is_added_only_where_one_may_be_missing(last: dict) -> None:
    given_messages = [USER, ANSWER, last]
    assert check_messages(given_messages, needs_response=False) == [*given_messages, message("assistant", "")]
    with pytest.raises(BadRow, match=f"the last message must be the assistant's, got '{last['role']}'"):
        check_messages(given_messages)
    assert check_messages([USER, ANSWER], needs_response=False) == [USER, ANSWER], "it has one"
    with pytest.raises(BadRow, match="got 'system'"):
        check_messages([USER, message("system", "s")], needs_response=False)


@pytest.mark.parametrize(
    ("answer", "is_empty"),
    [
        ({"content": " \n"}, True),
        ({"content": "", "tool_calls": [], "name": ""}, True),
        ({"content": "", "reasoning_content": "r"}, False),
    ],
)
def test_a_response_is_empty_when_none_of_its_fields_says_anything(answer: dict, is_empty: bool) -> None:
    messages = [USER, {"role": "assistant", **answer}]
    if is_empty:
        with pytest.raises(BadRow, match="the response is empty"):
            check_messages(messages)
    else:
        assert check_messages(messages) == messages


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (["hi"], "message 1 must be an object with `role` and `content`"),
        ([message("system", "s"), ANSWER], "no prompt: there is no user message before the response"),
        ([USER | {"content": ""}, ANSWER], "the prompt is empty"),
        ([message("system", "s"), USER | {"content": " "}, ANSWER], "message 2 is empty"),
        ([USER, ANSWER | {"content": "\ud800"}], "message 2: not valid Unicode (a lone surrogate)"),
        ([USER, ANSWER | {"name": "\ud800"}], "message 2: name: not valid Unicode (a lone surrogate)"),
        ([USER | {"tags": {1, 2}}, ANSWER], "message 1: tags: no value of JSON: "),
    ],
)
def test_what_is_wrong_is_said_with_the_place(messages: list, what: str) -> None:
    with pytest.raises(BadRow) as caught:
        check_messages(messages)
    assert str(caught.value).startswith(what)


def test_what_says_something() -> None:
    assert [value for value in (None, "", [], {}, 0, False, " ", [None], 0.0) if says_something(value)] == [
        *(0, False, " ", [None], 0.0)
    ]
    assert extra_fields({"name": "n", "role": "user", "calls": [], "content": "", "x": 0}) == ["name", "x"]


@given(st.text(st.characters(exclude_categories=())))
def test_a_text_is_valid_when_it_has_utf8(text: str) -> None:
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        with pytest.raises(BadRow, match=r"^here: not valid Unicode"):
            valid_text(text, "here")
    else:
        assert valid_text(text, "here") == text


def test_values_of_json() -> None:
    """Neither a list that holds itself nor one of very many levels can be written."""
    check_json({"a": [1, 2.5, None, True, {"b": "ä"}]}, "it")
    loop: list = []
    loop.append(loop)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (b"bytes", {"a": object()}, {(1, 2): 3}, loop, deep):
        with pytest.raises(BadRow, match=r"^it: no value of JSON: "):
            check_json(value, "it")

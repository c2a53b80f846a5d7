"""What a row says besides its messages: from which column it is taken, what is refused, and what is left."""

from __future__ import annotations

from typing import Any

import pytest

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.data.messages import message
from ssgen_ds.data.other_columns import OtherColumns

USER = message("user", "q")
TOOL = {"name": "add"}


def of(
    columns: dict[str, str] | None = None,
    spoken_for: set[str] | None = None,
    ignored: tuple[str, ...] = (),
    system: str | None = None,
) -> OtherColumns:
    return OtherColumns(columns or {}, spoken_for or {"messages"}, ignored, system)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "row's"}, "row's"),
        ({"system": " \n"}, "recipe's"),
        ({"system": None}, "recipe's"),
        ({}, "recipe's"),
    ],
)
def test_a_system_prompt_of_the_row_counts_before_the_recipes(row: dict, expected: str) -> None:
    assert of(system="recipe's").with_system(row, [USER]) == [message("system", expected), USER]


def test_without_any_system_prompt_none_is_added() -> None:
    assert of().with_system({}, [USER]) == [USER]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt_of_the_messages_has_no_other_beside_it(role: str) -> None:
    own = [message(role, "s"), USER]
    for row in ({}, {"system": "s"}, {"system": ""}):
        assert of(system="recipe's").with_system(row, own) == own
    with pytest.raises(BadRow, match=r"two system prompts: .* 'system'; data\.ignore_fields=\[system\] leaves it out"):
        of().with_system({"system": "another"}, own)


def test_where_the_system_prompt_of_a_row_is_looked_for() -> None:
    """In the column that the recipe names, nowhere, or in a column of that name which nothing else has taken."""
    row = {"system": "s", "sys": "renamed"}
    assert of({"system": "sys"}).with_system(row, [USER])[0]["content"] == "renamed"
    assert of({"system": ""}).with_system(row, [USER]) == [USER]
    assert of(ignored=("system",)).with_system(row, [USER]) == [USER]
    assert of({"prompt": "system"}).with_system(row, [USER]) == [USER], "it is the prompt"
    assert of(spoken_for={"system"}).with_system(row, [USER]) == [USER], "a prompt template reads it"
    with pytest.raises(BadRow, match="the column 'sys' must hold a system prompt, got int"):
        of({"system": "sys"}).with_system({"sys": 3}, [USER])
    with pytest.raises(BadRow, match="the column 'system': not valid Unicode"):
        of().with_system({"system": "\ud800"}, [USER])


def test_template_inputs_may_be_json_text() -> None:
    """Arguments of the template stand beside tools and documents; what says nothing is left out."""
    row: dict[str, Any] = {
        "tools": '[{"name": "add"}]',
        "documents": [{"text": "d"}],
        "chat_template_kwargs": '{"x": 1}',
    }
    assert of().template_inputs(row) == {"tools": [TOOL], "documents": [{"text": "d"}], "x": 1}
    assert of().template_inputs({"tools": "[]", "documents": None, "chat_template_kwargs": "null"}) == {}
    assert of({"tools": "functions"}).template_inputs({"functions": [TOOL], "tools": "not looked at"}) == {
        "tools": [TOOL]
    }


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"tools": '{"name": "add"}'}, "the column 'tools' must hold a list, or its JSON text"),
        ({"documents": "no JSON"}, "the column 'documents' must hold a list, or its JSON text"),
        ({"tools": "[" * 100_000}, "the column 'tools' must hold a list, or its JSON text"),
        ({"chat_template_kwargs": [1]}, "the column 'chat_template_kwargs' must hold an object, or its JSON text"),
        (
            {"chat_template_kwargs": {"x": 1, "tokenize": True}},
            "the column 'chat_template_kwargs' sets tokenize, which",
        ),
        ({"tools": [b"bytes"]}, "the column 'tools': no value of JSON: "),
    ],
)
def test_inputs_that_the_template_cannot_have(row: dict, what: str) -> None:
    with pytest.raises(BadRow) as caught:
        of().template_inputs(row)
    assert str(caught.value).startswith(what)


def test_columns_that_nothing_is_taken_from_are_noted() -> None:
    """Neither those that say nothing nor those that are spoken for, left out knowingly, or the id."""
    others = of({"completion": "gold", "id": "key"}, ignored=("url",))
    others.look_at({"messages": [USER], "gold": "a", "key": 7, "url": "u", "system": "s", "tools": [TOOL]})
    assert others.unused == set()
    others.look_at({"messages": [USER], "score": 0, "note": "", "split": None})
    others.look_at({"messages": [USER], "id": "x", "note": ""})
    assert others.unused == {"score", "id"}

"""What a row says besides its messages: a system prompt, tools, documents, arguments of the template; and what is left.

The names are those that the training libraries use. Everything found is used or refused; a column of any other name is
noted as unused, so that the run can say so.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.data.messages import Message, check_json, message, says_something, valid_text
from ssgen_ds.recipe.checks import TEMPLATE_ARGUMENTS

_INPUTS: dict[str, type[Any]] = {"tools": list, "documents": list, "chat_template_kwargs": dict}


class OtherColumns:
    """Reads them from the rows of one source.

    Args:
        columns: the recipe's column names; "" means that a row's own column is not looked at.
        spoken_for: columns that prompt and response are made of.
        ignored: columns that are left out knowingly.
        system: the system prompt of conversations that have none.
    """

    def __init__(
        self, columns: dict[str, str], spoken_for: set[str], ignored: Collection[str], system: str | None
    ) -> None:
        self._system = system
        taken = spoken_for.union(ignored, (column for name, column in columns.items() if name != "id"))
        # By name: the column where a row may say it.
        self._column = {
            name: columns.get(name, name) for name in ("system", *_INPUTS) if name in columns or name not in taken
        }
        self._known = taken.union(self._column.values(), {columns.get("id", "id")})
        self.unused: set[str] = set()

    def look_at(self, row: dict[str, Any]) -> None:
        """Note the columns of a row that say something and that nothing is taken from."""
        if not row.keys() <= self._known:
            self.unused |= {str(name) for name in row.keys() - self._known if says_something(row[name])}

    def with_system(self, row: dict[str, Any], messages: list[Message]) -> list[Message]:
        """The messages after a system prompt: their own, else the row's, else the recipe's. Raises BadRow."""
        column = self._column.get("system")
        own = row.get(column) if column else None
        if says_something(own) and not isinstance(own, str):
            raise BadRow(
                f"the column {column!r} must hold a system prompt, got {type(own).__name__}; {_leave_out(column)}"
            )
        text = own if isinstance(own, str) and own.strip() else None
        if messages[0]["role"] in ("system", "developer"):
            if text is not None and text != messages[0]["content"]:
                raise BadRow(f"two system prompts: the first message and the column {column!r}; {_leave_out(column)}")
            return messages
        system = self._system if text is None else valid_text(text, f"the column {column!r}")
        return messages if system is None else [message("system", system), *messages]

    def template_inputs(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the row gives the chat template, by name; lists and objects may be JSON text. Raises BadRow."""
        inputs: dict[str, Any] = {}
        for name, kind in _INPUTS.items():
            column = self._column.get(name)
            value = _parsed(row.get(column)) if column else None
            if not says_something(value):
                continue
            if not isinstance(value, kind):
                expected = "a list" if kind is list else "an object"
                raise BadRow(f"the column {column!r} must hold {expected}, or its JSON text; {_leave_out(column)}")
            check_json(value, f"the column {column!r}")
            if kind is dict and (taken := [argument for argument in value if argument in TEMPLATE_ARGUMENTS]):
                raise BadRow(f"the column {column!r} sets {', '.join(taken)}, which is not the template's; take it out")
            inputs |= value if kind is dict else {name: value}
        return inputs


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _leave_out(column: str | None) -> str:
    return f"data.ignore_fields=[{column}] leaves it out"

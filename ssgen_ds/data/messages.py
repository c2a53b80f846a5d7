"""The messages of a row: what they must look like, and what of them goes on to the chat template.

A message is {"role", "content"} and whatever else the row gives it (`reasoning_content`, `tool_calls`, `name`, ...).
Whether the chat template reads those other fields is found where it is known: `ssgen_ds.data.template`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ssgen_ds.data.bad_row import BadRow

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_ALWAYS = ("role", "content")


def message(role: str, content: str) -> Message:
    """A message without other fields."""
    return {"role": role, "content": content}


def check_messages(messages: list[Any], needs_response: bool = True, ignored: Collection[str] = ()) -> list[Message]:
    """The messages without null and `ignored` fields. Raises BadRow unless they are well formed and end in a response.

    Without `needs_response`, an empty response is added where there is none.
    """
    if not messages:
        raise BadRow("messages is empty")
    checked = [_check_message(given, number, ignored) for number, given in enumerate(messages, 1)]
    absent = not needs_response and checked[-1]["role"] in ("user", "tool")
    if absent:
        checked.append(message("assistant", ""))
    if checked[-1]["role"] != "assistant":
        raise BadRow(f"the last message must be the assistant's, got {checked[-1]['role']!r}")
    if not absent and not checked[-1]["content"].strip() and not extra_fields(checked[-1]):
        raise BadRow("the response is empty")
    if not any(one["role"] == "user" for one in checked):
        raise BadRow("no prompt: there is no user message before the response")
    for number, one in enumerate(checked, 1):
        if one["role"] == "user" and not one["content"].strip():
            raise BadRow("the prompt is empty" if len(checked) == 2 else f"message {number} is empty")
    return checked


def extra_fields(given: Message) -> list[str]:
    """The fields besides role and content that say something, in their order."""
    return [name for name, value in given.items() if name not in _ALWAYS and says_something(value)]


def says_something(value: Any) -> bool:
    """Whether anything is lost with a value: False for null, an empty text, an empty list and an empty object."""
    return value is not None and value != "" and value != [] and value != {}


def _check_message(given: Any, number: int, ignored: Collection[str]) -> Message:
    if not isinstance(given, dict) or "role" not in given:
        raise BadRow(f"message {number} must be an object with `role` and `content`")
    fields = {name: value for name, value in given.items() if value is not None and name not in ignored}
    role = given["role"]
    if role not in ROLES:
        raise BadRow(f"message {number}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if fields.get("content") is None and says_something(fields.get("tool_calls")):
        fields["content"] = ""  # chat interfaces write null for a turn that only calls tools
    if "content" not in fields:
        raise BadRow(f"message {number} must be an object with `role` and `content`")
    content = fields["content"]
    if not isinstance(content, str):
        raise BadRow(f"message {number}: content must be text, got {type(content).__name__}")
    rest = {name: value for name, value in fields.items() if name not in _ALWAYS}
    for name, value in rest.items():
        check_json(value, f"message {number}: {name}")
    return {**message(role, valid_text(content, f"message {number}")), **rest}


def valid_text(text: str, name: str) -> str:
    """The text itself. Raises BadRow where it has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name}: not valid Unicode (a lone surrogate)") from None
    return text


def check_json(value: Any, name: str) -> None:
    """Raises BadRow unless a value is one that JSON knows."""
    try:
        valid_text(json.dumps(value, ensure_ascii=False), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{name}: no value of JSON: {error}") from None

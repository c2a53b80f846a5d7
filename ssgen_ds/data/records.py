"""Rows -> records: whatever shape a row has, a `Record` is a list of messages that ends in the assistant's response."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ssgen_ds.data.messages import Message, check_messages, message, valid_text
from ssgen_ds.data.other_columns import OtherColumns
from ssgen_ds.data.paths import resolve_path
from ssgen_ds.data.readers import BadRow, Row, load_hub, read_files, read_hub
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

LISTED_BAD_ROWS = 20


@dataclass(frozen=True)
class Record:
    """One conversation. Its last message is the assistant's.

    id: the row's own, or `content_hash` where it has none. content_hash: 24 hex digits of messages and inputs.
    gold_texts: of a row that is to be answered, all the responses that count as right; its message has the first of
    them. inputs: what the row gives the chat template besides its messages, by name: tools, documents, arguments.
    """

    id: str
    messages: list[Message]
    where: str
    content_hash: str
    gold_texts: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass
class BadRows:
    """How many rows were refused, and the first few of them as `place: what is wrong`."""

    total: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, where: str, what: BadRow) -> str:
        line = f"{where}: {what}"
        self.total += 1
        if len(self.listed) < LISTED_BAD_ROWS:
            self.listed.append(line)
        return line

    def error(self, key: str) -> UserError:
        more = self.total - len(self.listed)
        heading = f"{key}: {self.total} bad row{'s' * (self.total > 1)} (data.on_bad_row=skip leaves such rows out)"
        return UserError.from_list(heading, self.listed + [f"... and {more} more"] * (more > 0))


def read_rows(source: SourceConfig, key: str, streaming: bool = False) -> Iterator[tuple[str, Row | BadRow]]:
    """All rows of one source as (place, row). `streaming` matters for hub ids only; files are always read lazily."""
    files = resolve_path(source.path, key)
    rows = read_files(files) if files is not None else read_hub(source, load_hub(source, streaming, key))
    try:
        yield from rows
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


class RecordMaker:
    """Turns the rows of one source into records, by the recipe's `columns`, `prompt`, `system` and `ignore_fields`.

    Raises UserError at once where the recipe contradicts itself, or names a column that the first row lacks.
    """

    def __init__(self, source: SourceConfig, data: DataConfig, key: str, needs_response: bool = True) -> None:
        self.key = key
        self.needs_response = needs_response
        self.path = source.path
        self.ignored = frozenset(data.ignore_fields)
        self.is_first = True  # whether no row was seen yet
        own = source.columns or {}
        for columns, template, place in ((data.columns, data.prompt, "data"), (own, source.prompt, key)):
            _refuse_contradictions(columns, template, place)
        # What a source says beats what `data` says, also where the two are different ways to name the prompt.
        self.columns: dict[str, str] = dict([*data.columns.items(), *own.items()])
        self.template = source.prompt
        if source.prompt is not None or "prompt" in own:
            self.columns.pop("messages", None)
        else:
            self.template = data.prompt
        if self.template is not None:
            self.columns.pop("prompt", None)
        self.pieces = parse_template(self.template, key) if self.template is not None else None
        self.id_column = self.columns.get("id", "id")
        spoken_for = {column for _, column in self.pieces or () if column is not None}
        if "messages" not in self.columns:
            spoken_for.add(self.columns.get("completion", "completion"))
        if not self.columns.keys() & {"messages", "prompt", "completion"} and self.pieces is None:
            spoken_for |= {"messages", "prompt"}
        self.others = OtherColumns(self.columns, spoken_for, self.ignored, data.system)

    def __call__(self, where: str, row: Row) -> Record:
        """The record of one row. Raises BadRow; UserError if the first row lacks a column that the recipe names."""
        try:
            named = self._named_messages(row)
        except _MissingColumn as missing:
            if self.is_first:
                raise UserError(f"{self.key}: {where}: {missing}") from None
            raise BadRow(str(missing)) from None
        finally:
            self.is_first = False
        messages = self.others.with_system(row, check_messages(named, self.needs_response, self.ignored))
        inputs = self.others.template_inputs(row)
        digest = content_hash(messages, inputs)
        gold_texts = self._gold_texts(row, messages) if not self.needs_response else ()
        self.others.look_at(row)
        return Record(self._id(row) or digest, messages, where, digest, gold_texts, inputs)

    def _named_messages(self, row: Row) -> list[Any]:
        columns = self.columns
        explicit_pair = self.pieces is not None or "prompt" in columns or "completion" in columns
        if "messages" in columns or (not explicit_pair and "messages" in row):
            messages = _column(row, columns.get("messages", "messages"), "data.columns.messages")
            if not isinstance(messages, list):
                raise BadRow(f"messages must be a list, got {type(messages).__name__}")
            return messages
        needed = {"prompt", "completion"} if self.needs_response else {"prompt"}
        if not explicit_pair and not needed <= row.keys():
            raise _MissingColumn("neither `messages` nor `prompt` and `completion`", row)
        completion = self._completion(row)
        if self.pieces is not None:
            prompt: Any = render_template(self.pieces, row)
        else:
            prompt = _column(row, columns.get("prompt", "prompt"), "data.columns.prompt")
        return _as_messages(prompt, "user", "prompt") + completion

    def _completion(self, row: Row) -> list[Any]:
        column = self.columns.get("completion", "completion")
        if not self.needs_response and row.get(column) in (None, "", []):
            return []
        value = _column(row, column, "data.columns.completion")
        if not self.needs_response and _is_texts(value):
            value = value[0]
        return _as_messages(value, "assistant", "response")

    def _gold_texts(self, row: Row, messages: list[Message]) -> tuple[str, ...]:
        """All right answers of a row: a list of texts where its response is one, else the response, or none."""
        value: Any = row.get(self.columns.get("completion", "completion"))
        if "messages" not in self.columns and _is_texts(value):
            if any(not text.strip() for text in value):
                raise BadRow("one of the references is empty")
            return tuple(valid_text(text, "a reference") for text in value)
        response = messages[-1]["content"]
        return (response,) if response.strip() else ()

    def _id(self, row: Row) -> str | None:
        if not self.id_column:
            return None  # columns: {id: ""} ignores an id column
        given = row.get(self.id_column)
        if given is None or given == "":
            if "id" in self.columns:
                raise BadRow(f"no id in the column {self.id_column!r}")
            return None
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise BadRow(f"the id must be text or a whole number, got {type(given).__name__}")
        return valid_text(str(given), "the id")


def content_hash(messages: list[Message], inputs: dict[str, Any] | None = None) -> str:
    """24 hex digits over the canonical JSON of the messages, and of what the template is given besides them."""
    content = [messages, inputs] if inputs else messages
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()


def parse_template(template: str, key: str) -> list[tuple[str, str | None]]:
    """`Sum up: {document}` as (literal, column) pairs. Only the template is parsed: braces in the data stay as is."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: prompt template: {error}; write {{{{ and }}}} for literal braces") from None
    if any(spec or conversion for _, _, spec, conversion in parsed):
        raise UserError(f"{key}: prompt template: only plain {{column}} fields, no `:` or `!`")
    if not any(column is not None for _, column, _, _ in parsed):
        raise UserError(f"{key}: prompt template names no column, so that all prompts would be equal")
    return [(literal, column) for literal, column, _, _ in parsed]


def render_template(pieces: list[tuple[str, str | None]], row: Row) -> str:
    """The template filled with the row's columns. Raises BadRow if a value is missing or is no plain value."""
    text = []
    for literal, column in pieces:
        text.append(literal)
        if column is not None:
            value = _column(row, column, "data.prompt")
            if not isinstance(value, str | int | float):
                raise BadRow(f"column {column!r} must hold text for the prompt, got {type(value).__name__}")
            text.append(str(value))
    return "".join(text)


class _MissingColumn(Exception):
    def __init__(self, what: str, row: Row) -> None:
        columns = ", ".join(map(str, row)) or "none"
        super().__init__(f"{what}; the row's columns are: {columns} (see data.columns and data.prompt)")


def _column(row: Row, column: str, key: str) -> Any:
    if column not in row:
        raise _MissingColumn(f"{key} names the column {column!r}, which is not there", row)
    value = row[column]
    if value is None:
        raise BadRow(f"column {column!r} is empty")
    return value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _as_messages(value: Any, role: str, name: str) -> list[Any]:
    """Plain text becomes one message of `role`; a list of messages stays."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"the {name} is empty")
        return [message(role, value)]
    if isinstance(value, list):
        if not value:
            raise BadRow(f"the {name} is empty")
        return value
    raise BadRow(f"the {name} must be text or a list of messages, got {type(value).__name__}")


def _refuse_contradictions(columns: dict[Any, str], template: str | None, place: str) -> None:
    if "messages" in columns and (template is not None or "prompt" in columns or "completion" in columns):
        raise UserError(f"{place}: give either columns.messages, or the prompt and columns.completion")
    if "prompt" in columns and template is not None:
        raise UserError(f"{place}: give either the prompt template or columns.prompt")

"""`key=value` on the command line, read by the type of the key: a text takes its text as typed, all else is YAML.

`output_dir=sweep #1` is the folder `sweep #1`, `data.system=no` the word no. A text in quotes is read as YAML reads it,
so that `data.prompt="{question}\\nAnswer:"` has two lines. Text inside lists and mappings is text, too.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from ssgen_ds.errors import UserError

_FLOW = ("[", "{")  # how a list or a mapping begins on the command line


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping, of which YAML would drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(node)
        return super().construct_mapping(node, deep=deep)


def strict_yaml(text: str) -> Any:
    """What `text` says. Raises yaml.YAMLError, also for a key that stands twice."""
    return yaml.load(text, StrictLoader)  # it is a SafeLoader


def apply_override(raw: dict[str, Any], override: str, model: type[BaseModel]) -> None:
    """Set a dotted key of `raw`, a recipe of the kind `model`. Raises UserError for what is no key=value."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, for instance train.lr=1e-5")
    *parents, last = key.split(".")
    section, kind = raw, model
    for depth, parent in enumerate(parents, start=1):
        kind = _kind_of(kind, parent)
        section[parent] = _section(section.get(parent), kind, ".".join(parents[:depth]), key)
        section = section[parent]
    section[last] = _value(text, _kind_of(kind, last), key)


def _section(value: Any, kind: Any, name: str, key: str) -> dict[str, Any]:
    """The section `name` of a recipe as it stands, for an override of `key` in it. Nothing else in it is lost."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # a recipe may name a list of one by its entry
    if value is None or value == []:
        return {}
    if isinstance(value, str) and any(
        _is_section(*get_args(part)) for part in _parts(kind) if get_origin(part) is list
    ):
        return {"path": value}  # a source may be its path alone
    if isinstance(value, list):
        raise UserError(
            f"override {key}: {name} is a list of {len(value)}, and this names none of them; give the whole list: "
            f"{name}=[{{...}}, ...]"
        )
    if not isinstance(value, dict):
        raise UserError(f"override {key}: {name} is {value!r} in the recipe, no section with keys of its own")
    return value


def _value(text: str, kind: Any, key: str) -> Any:
    takes_list = any(get_origin(part) is list for part in _parts(kind))
    if _takes_text(kind) or (takes_list and not text.lstrip().startswith((*_FLOW, "- "))):
        return _text(text, kind)  # the recipe takes a path for a list of one
    try:
        node = yaml.compose(text, StrictLoader)
        return None if node is None else _construct(node, kind)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"override {key}: {error.problem}") from None
    except yaml.YAMLError:
        return text


def _text(text: str, kind: Any) -> str | None:
    """As typed; in quotes as YAML has it. Empty and `null` are none where the key may be none."""
    if type(None) in _parts(kind) and text in ("", "null"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        try:
            node = yaml.compose(text, StrictLoader)
        except yaml.YAMLError:
            return text  # such as: "A" or "B"
        if isinstance(node, yaml.ScalarNode) and node.style == text[0]:
            return str(node.value)
    return text


def _construct(node: yaml.Node, kind: Any) -> Any:
    """The value of a YAML node; what has the type of a text keeps its text (`no`, `42`, `1.0`)."""
    whole = _without_none(kind)
    if isinstance(node, yaml.ScalarNode) and _takes_text(kind):
        is_none = node.style is None and node.value in ("", "~", "null")
        return None if is_none and type(None) in _parts(kind) else node.value
    if isinstance(node, yaml.ScalarNode) and _is_section(whole):
        return node.value  # a source may be its path alone
    lists = [part for part in _parts(kind) if get_origin(part) in (list, tuple)]
    if isinstance(node, yaml.SequenceNode) and lists:
        return [_construct(item, get_args(lists[0])[0]) for item in node.value]
    if isinstance(node, yaml.MappingNode) and (get_origin(whole) is dict or _is_section(whole)):
        _refuse_twice(node)
        return {key.value: _construct(value, _kind_of(whole, key.value)) for key, value in node.value}
    if isinstance(node, yaml.MappingNode) and lists:  # an entry for a list of one
        return _construct(node, get_args(lists[0])[0])
    loader = StrictLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_twice(node: Any) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice; leave one of them out"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)


def _kind_of(section: Any, key: str) -> Any:
    """The type of one key of a section or mapping; None where there is no such key."""
    section = _without_none(section)
    if _is_section(section):
        field = section.model_fields.get(key)
        return None if field is None else field.annotation
    lists = [part for part in _parts(section) if get_origin(part) is list]
    if lists:  # data.train.path: the one entry of the list
        return _kind_of(get_args(lists[0])[0], key)
    return get_args(section)[1] if get_origin(section) is dict else None


def _parts(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(part for item in get_args(kind) for part in _parts(item))
    return (kind,)


def _without_none(kind: Any) -> Any:
    parts = tuple(part for part in _parts(kind) if part is not type(None))
    return parts[0] if len(parts) == 1 else kind


def _takes_text(kind: Any) -> bool:
    """Whether it is a text and nothing else (or none); an unknown key, whose kind is None, is not."""
    parts = [part for part in _parts(kind) if part is not type(None)]
    return bool(parts) and all(
        part is str or (get_origin(part) is Literal and all(isinstance(word, str) for word in get_args(part)))
        for part in parts
    )


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)

"""Every key of a recipe as docs/recipe.md shows it: its type and default in words, from the pydantic models."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, JsonValue
from pydantic.fields import FieldInfo

from ssgen_ds.recipe.schema import Recipe

NUMBERS = {int: "whole number", float: "number"}
BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "to {}"), ("lt", "below {}"))
SECTIONS_IN_LISTS = ("data.eval",)  # of the same kind as data.train: described there


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, default) of every key that can be set, in the order of the models."""
    for name, field in model.model_fields.items():
        key, section = f"{prefix}{name}", field.annotation
        if _is_section(section):
            yield from recipe_keys(section, f"{key}.")
            continue
        yield key, in_words(section, field.metadata), default_in_words(field)
        for entry in get_args(section):
            if _is_section(entry) and key not in SECTIONS_IN_LISTS:
                yield from recipe_keys(entry, f"{key}[].")


def in_words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type with its bounds, as a person would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0], [limit for field in arguments[1:] for limit in getattr(field, "metadata", [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        words = [word for item in metadata for word in _words_of(item)]
        if words:  # a whole number from 1 on, or one of a few words
            return ", ".join(["whole number from 1", *(f"`{word}`" for word in words)])
        return " or ".join("none" if item is type(None) else in_words(item) for item in arguments)
    if origin is list:
        return "list of sources" if _is_section(arguments[0]) else f"list of {in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {in_words(arguments[0])} to {in_words(arguments[1])}"
    if origin is tuple:
        return ", then ".join(map(in_words, arguments))
    if annotation in NUMBERS:
        limits = {name: getattr(item, name) for item in metadata for name, _ in BOUNDS if hasattr(item, name)}
        said = [text.format(_number(limits[name])) for name, text in BOUNDS if name in limits]
        return " ".join([NUMBERS[annotation], *said])
    return {bool: "`true`, `false`", str: "text", JsonValue: "anything"}[annotation]


def default_in_words(field: FieldInfo) -> str:
    """The default as one would write it in YAML."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{_number(value)}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(_number, value))}]`"
    return "`{}`".format(str(value).replace("\n", "\\n"))


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 2**31 else "2^31"


def _words_of(item: Any) -> tuple[str, ...]:
    return inspect.getclosurevars(item.func).nonlocals.get("words", ()) if isinstance(item, AfterValidator) else ()


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

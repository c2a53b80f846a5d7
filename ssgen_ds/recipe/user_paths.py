"""The user's own folders: the cache, and the home folder in paths.

A shell expands `~` only at a word's start, not in `output_dir=~/runs` or `--out=~/x`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ssgen_ds.errors import UserError

PATH_OPTIONS = ("--out", "--data", "--model", "--deepspeed", "--venv", "--container")


def expanded(path: str) -> str:
    """`~` and `~name` at the start become the home folder. Raises ValueError where there is none.

    What lies in a folder whose name begins with a tilde is named `./~name`.
    """
    if not path.startswith("~"):
        return path
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        name = path.split("/", 1)[0]
        raise ValueError(f"there is no home folder for {name!r}; write the whole path, or ./{path} for that name")
    return whole


def expanded_path(path: str | Path, what: str) -> str:
    """The same for what the command line names as `what`. Raises UserError."""
    try:
        return expanded(str(path))
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def expanded_arguments(arguments: list[str]) -> list[str]:
    """A command line with the home folder in the values of PATH_OPTIONS and in what is no option's value."""
    whole: list[str] = []
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in PATH_OPTIONS and equals:
            argument = f"{name}={expanded_path(value, name)}"
        elif before in PATH_OPTIONS or not before.startswith("-"):
            argument = expanded_path(argument, before if before in PATH_OPTIONS else argument)
        before = argument
        whole.append(argument)
    return whole


def cache_root() -> Path:
    """Where converted models are kept: $SSGEN_CACHE, else ~/.cache/ssgen-ds. Raises UserError without a home."""
    named = os.environ.get("SSGEN_CACHE")
    if named:
        return Path(expanded_path(named, "SSGEN_CACHE"))
    try:
        return Path.home() / ".cache" / "ssgen-ds"
    except RuntimeError:  # a container started with a user id that has no name
        raise UserError("there is no home folder to keep the cache in; set SSGEN_CACHE to a folder") from None

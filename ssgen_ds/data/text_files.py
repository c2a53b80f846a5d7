"""JSON, JSON lines and CSV as people have them. What the file holds counts, not whether it is named .json or .jsonl.

A row that is wrong is yielded as a `BadRow`; what makes every row of a file doubtful (a header that names a column
twice, a quote that is never closed) is a UserError, whatever `on_bad_row` says.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEPARATOR_LINE = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)  # how Excel says what separates cells


def read_json(file: Path) -> Iterator[tuple[str, Any]]:
    """An array, an object that holds one, or an object a line."""
    encoding = _encoding(file)
    if encoding == "utf-16":
        yield from _utf16_json(file)
        return
    # Read as bytes: only \n ends a line (text may hold U+2028), and one bad byte costs one row, not the file.
    with file.open("rb") as lines:
        if _holds_lines(file, lines, file.read_bytes):
            lines.seek(0)
            yield from _json_lines(file, lines)
            return
    yield from _json_whole(file, file.read_bytes())


def _utf16_json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_bytes().decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: begins like UTF-16, but is not: {error.reason}; write it as UTF-8") from None
    content = text.encode("utf-8", errors="surrogatepass")
    lines = content.splitlines()
    if _holds_lines(file, lines, lambda: content):
        yield from _json_lines(file, lines)
    else:
        yield from _json_whole(file, content)


def _json_lines(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{file}:{number}", _parse(line)


def _holds_lines(file: Path, lines: Iterable[bytes], whole: Callable[[], bytes]) -> bool:
    """Whether a JSON file is to be read line by line."""
    filled = (line for line in lines if line.strip())
    first = next(filled, b"")
    start = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if file.suffix.lower() == ".jsonl":
        return start != b"[" or not isinstance(_parse(whole()), list)
    return start == b"{" and _is_object(first) and next(filled, None) is not None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json_whole(file: Path, text: bytes) -> Iterator[tuple[str, Any]]:
    content = _parse(text)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        what = "expected an array of objects, an object that holds a single list, or an object a line (as in .jsonl)"
        if len(lists) > 1:
            what += f"; this is one object with {len(lists)} lists: write it row by row, not column by column"
        content = lists[0] if len(lists) == 1 else BadRow(what)
    if isinstance(content, list):
        for number, item in enumerate(content, 1):
            yield f"{file}: item {number}", item
    elif isinstance(content, BadRow):
        yield str(file), content
    else:
        yield str(file), BadRow(f"expected an array of objects, got {type(content).__name__}")


def _parse(text: bytes) -> Any:
    """JSON or a BadRow."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start})")
    except RecursionError:
        return BadRow("not valid JSON: nested too deeply")
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}")
    except BadRow as problem:
        return problem


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises BadRow for a key that stands twice: JSON would keep the last value and drop the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"the key {twice!r} stands twice in one object")
    return found


def read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    """A row a record, as columns of text; the header decides what separates cells (comma, semicolon, tab or |)."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the default refuses cells above 128 KiB
    # surrogateescape: a bad byte must cost one row, not the file.
    encoding = _encoding(file)
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with file.open(newline="", encoding=encoding, errors=errors) as text:
        try:
            yield from _csv_rows(file, text)
        except UnicodeError as error:
            raise UserError(f"{file}: begins like UTF-16, but is not: {error}; write it as UTF-8") from None


def _csv_rows(file: Path, text: Any) -> Iterator[tuple[str, Any]]:
    style, skipped = _csv_style(text)
    reader = csv.reader(text, strict=True, **style)
    header: list[str] | None = None
    last_line = skipped
    while True:
        first = last_line + 1
        where = f"{file}:{first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            last_line = reader.line_num + skipped
            if "unexpected end" in str(error):
                raise UserError(
                    f"{where}: a quote that opens in this row is never closed, so that the row would swallow the rest "
                    f"of the file (to line {last_line}); close it, or write quotes inside a cell twice"
                ) from None
            lines = f" (lines {first} to {last_line} are read as one row: a quote opens in line {first})"
            yield where, BadRow(f"not valid CSV: {error}{lines if last_line > first else ''}")
            continue
        last_line = reader.line_num + skipped
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(where, cells)
            continue
        row = _csv_row(header, cells)
        if isinstance(row, BadRow) and last_line > first:
            row = BadRow(f"{row} (lines {first} to {last_line} are one row: a quote opens in line {first})")
        yield where, row


def _csv_style(text: Any) -> tuple[dict[str, Any], int]:
    """Arguments of csv.reader, and how many lines come before the header; the file is left where the header begins."""
    start, skipped = text.tell(), 0
    line = text.readline()
    named = _SEPARATOR_LINE.fullmatch(line)
    if named:
        start, skipped = text.tell(), 1
        line = text.readline()
    while not line.strip() and line:
        line = text.readline()
    text.seek(start)
    bare = re.sub(r'"[^"]*"', "", line)
    delimiter = named[1] if named else next((mark for mark in DELIMITERS if mark in bare), ",")
    return {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in bare}, skipped


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: the header names the column {twice[0]!r} twice; rename or remove one of them")
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell if not char.isascii()):
        return BadRow("not UTF-8")
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells, but the header names {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _encoding(file: Path) -> str:
    with file.open("rb") as content:
        return "utf-16" if content.read(2) in _UTF16 else "utf-8-sig"

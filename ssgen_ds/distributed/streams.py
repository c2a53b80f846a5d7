"""Standard streams as every command may count on them, however it was started."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, cast

_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, a terminal


class _Lasting(io.FileIO):
    """Output whose reader may go: a run does not end for it before its checkpoint."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(data)


def steady() -> None:
    """Call it first. A stream that was closed leads nowhere, and no other file gets its number; a character that the
    stream's encoding does not have is written as its code."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  for the whole process
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # somebody has taken it, a test for instance
        encoding = "utf-8" if stream is None else stream.encoding
        by_line = name == "stderr" or os.isatty(descriptor)
        if stream is not None:
            stream.flush()
        raw: Any = io.BufferedWriter(cast(Any, _Lasting(descriptor, "w", closefd=False)))
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=by_line))
        setattr(sys, f"__{name}__", getattr(sys, name))

"""Standard streams of a command, however it was started. Each program runs in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import environment

START = "import os, sys\nfrom ssgen_ds.distributed.streams import steady\n"


def run(program: str, **how: Any) -> subprocess.CompletedProcess[str]:
    extra = how.pop("extra", {})
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    command = [sys.executable, "-c", START + program]
    return subprocess.run(command, env=environment(**extra), text=True, timeout=60, **how)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-"])
def test_a_closed_stream_leads_nowhere_and_its_number_is_not_given_away(tmp_path: Path, closed: str) -> None:
    """What is printed would else land in the file that the command opens next."""
    file = tmp_path / "made"
    program = f"""{START}
steady()
with open({str(file)!r}, "w") as made:
    made.write(f"{{made.fileno() > 2}} ")
    print("out", flush=True)
    print("error", file=sys.stderr)
    made.write(repr(sys.stdin.read()))
"""
    line = f"exec {shlex.join([sys.executable, '-c', program])} {closed}"
    subprocess.run(["sh", "-c", line], env=environment(), input=b"", capture_output=True, timeout=60, check=True)
    assert file.read_text() == "True ''"


def test_a_character_that_the_encoding_lacks_is_written_as_its_code() -> None:
    done = run("steady(); print('\u00e4\u20ac'); sys.exit('\u00e4')", extra={"PYTHONIOENCODING": "ascii"})
    assert (done.stdout, done.stderr) == ("\\xe4\\u20ac\n", "\\xe4\n")


def test_a_reader_that_goes_ends_nothing() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = run("steady()\nfor _ in range(9): print('x' * 9999, flush=True)\nsys.exit(7)", stdout=writes)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_full_disk_is_still_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = run("steady(); print('x', flush=True)", stdout=full)
    assert done.returncode != 0 and "No space left on device" in done.stderr


def test_what_was_printed_before_comes_first_and_errors_come_at_once() -> None:
    """A process that ends on the spot has written its errors by line; its other output is still in memory."""
    done = run("print('before'); steady(); print('after'); print('error', file=sys.stderr); os._exit(0)")
    assert (done.stdout, done.stderr) == ("before\n", "error\n")
    assert run("print('before'); steady(); print('after')").stdout == "before\nafter\n"


def test_a_stream_that_somebody_has_taken_stays_theirs() -> None:
    done = run(
        "import io\nsys.stdout = mine = io.StringIO()\nsteady()\n"
        "print('kept')\nassert sys.stdout is mine\nsys.stderr.write(mine.getvalue())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "kept\n")

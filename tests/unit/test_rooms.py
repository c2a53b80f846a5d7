"""The package is rooms, one above the other: imports run down only, and nobody imports in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE, TESTS = Path("ssgen_ds"), Path("tests/unit")
# From top to bottom. Rooms of one line know nothing of each other.
ROOMS = (
    {"training"},
    {"evaluate"},
    {"selfgen", "plan", "doctor"},
    {"inference"},
    {"sampler"},
    {"checkpoint", "report"},
    {"modeling"},
    {"run"},
    {"data"},
    {"distributed"},
    {"recipe"},
    {"metrics"},
)
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
HALL = {"__init__", "__main__", "cli", "config", "errors", "preview", "slurm", "train"}  # the package root
GROUND = "errors"  # the one module of the hall that rooms import


def modules() -> dict[str, Path]:
    """Dotted name -> file, without the `__init__` files, which are empty."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    return {".".join(file.with_suffix("").parts): file for file in files}


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, inside a function, or for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found |= {name if name in known else node.module for alias in node.names
                      if (name := f"{node.module}.{alias.name}")}  # fmt: skip
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == PACKAGE.name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    assert len(known) > 100
    return {name: imported(file, known) for name, file in known.items()}


def room(module: str) -> str:
    """The room of a module; its own name in the hall."""
    return module.split(".")[1] if module.count(".") else module


def test_the_hall_has_the_entry_points_and_the_errors_only():
    assert {file.stem for file in PACKAGE.glob("*.py")} == HALL
    folders = {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert folders == FLOOR.keys(), "a room without a floor, or a floor without a room"


def test_imports_run_down_only(graph):
    wrong = []
    for module, others in graph.items():
        for other in others:
            here, there = room(module), room(other)
            if here == there or (here in HALL and here != GROUND) or there == GROUND:
                continue
            if here not in FLOOR or there not in FLOOR or FLOOR[here] >= FLOOR[there]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "these imports run up, or across:\n" + "\n".join(sorted(wrong))


def test_the_package_never_imports_the_benchmarks():
    """They are in the checkout only, and import the package."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    assert not re.findall(r"^ *(?:from|import) bench\b.*", code, re.MULTILINE)


def test_nobody_imports_in_a_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_unit_tests_lie_in_the_room_that_they_test():
    rooms = {path.name for path in TESTS.iterdir() if any(path.glob("test_*.py"))}
    assert rooms - {"bench"} == FLOOR.keys()
    loose = {file.stem.removeprefix("test_") for file in TESTS.glob("*.py")}
    assert loose <= HALL | {"docs", "examples", "rooms"}, "a test of a room's module, outside of the room"

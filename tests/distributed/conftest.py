"""One spawn of ranks serves a whole module of cases."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run, torchrun
from tests.support.tiny_runs import make_inputs

Results = dict[str, Any]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Folder with tiny models and data, shared by all spawns so that their results can be compared."""
    folder = tmp_path_factory.mktemp("cases")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def run_cases(inputs) -> Callable[[str, int], Results]:
    """Run a case module once on 1 or 2 ranks; later calls return the same results, or fail in the same way."""

    @functools.cache
    def spawn(module: str, ranks: int) -> tuple[Results, str]:
        out = inputs / f"{module.rsplit('.', 1)[-1]}-{ranks}.json"
        arguments = ("tests.support.cases", module, str(out))
        command = [sys.executable, "-m", *arguments] if ranks == 1 else torchrun(*arguments, ranks=ranks)
        finished = run(command, timeout=900)
        if finished.returncode == 0:
            return {name: item["result"] for name, item in json.loads(out.read_text()).items()}, ""
        failure = Path(f"{out}.error")
        what = failure.read_text() if failure.exists() else finished.stderr[-6000:]
        return {}, f"the ranks ended with {finished.returncode}\n{what}"

    def run_once(module: str, ranks: int) -> Results:
        results, failure = spawn(module, ranks)
        assert not failure, failure
        return results

    return run_once

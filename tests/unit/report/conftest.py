"""A run folder as training leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import report_folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(num_steps=96, method="bss+rac", finished=True) -> the run folder."""

    def make(num_steps: int = 96, method: str = "bss+rac", finished: bool = True) -> Path:
        return report_folder.make_run(tmp_path / f"{method}-run", num_steps, method, finished)

    return make

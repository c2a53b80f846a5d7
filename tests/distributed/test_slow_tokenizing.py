"""Tokenising may take longer than any limit: each row is progress, and what is done is kept when a start is killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launch import Finished, finish, free_port, start
from tests.support.tiny_models import save_tiny_model

ROWS, DIE_AFTER = 256, 150
PART_ROWS, SECONDS = 32, 6.0  # as in the worker, which cannot be imported


def ranks(folder: Path, die_after: int) -> list[Finished]:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.distributed.slow_tokenizing_worker", str(folder), str(die_after)]
    cache = {"SSGEN_CACHE": str(folder / "cache")}
    processes = [start(command, RANK=rank, LOCAL_RANK=rank, **common, **cache) for rank in ("0", "1")]
    return [finish(process, 180) for process in processes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path / "llama")
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_it_takes_longer_than_the_limit_and_goes_on_after_a_kill(folder: Path) -> None:
    killed, other = ranks(folder, DIE_AFTER)
    assert killed.returncode == -9 and other.returncode == 1, other
    assert "no rank has made progress" not in other.stderr
    kept = len(list((folder / "cache" / "data").glob(".parts-*/*.arrow")))
    assert kept >= 2, "beside what the threads had begun"
    results = ranks(folder, 0)
    assert [result.returncode for result in results] == [0, 0], results
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["rows"] == second["rows"] == ROWS
    assert first["encoded"] == ROWS - kept * PART_ROWS and second["encoded"] == 0
    assert first["seconds"] > 1.2 * SECONDS, "else this shows nothing"

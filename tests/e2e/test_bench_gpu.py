"""`bench/gpu.sh` with small sizes on a CPU: every item runs, and what was measured survives a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from bench.gpu.items import ITEMS
from tests.support.launch import finish, run, start

COMMAND = [sys.executable, "-m", "bench.gpu"]


def lines_of(file: Path) -> list[dict]:
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_every_item_is_measured(tmp_path: Path) -> None:
    finished = run([*COMMAND, str(tmp_path / "gpu.jsonl"), "--tiny"], 200)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = {line["item"]: line for line in lines_of(tmp_path / "gpu.jsonl")}
    assert list(found) == ["machine", *ITEMS]
    assert not [line for line in found.values() if "found" not in line]
    checks = found["checks"]["found"]
    assert checks["same at W=1 and W=all"] == checks["tokens"] > 0
    partitioned = found["partitioned"]["found"]
    assert partitioned["same when gathered"] == partitioned["same when sharded"] == partitioned["tokens"] > 0
    assert found["micro_batch"]["found"]["sequences"] == 4 and found["micro_batch"]["found"]["loss is finite"]
    assert found["lora_step"]["found"]["without checkpointing"]["tokens/s"] > 0
    contexts = found["contexts"]["found"]
    assert {"1", "4", "8", "16", "all"} <= contexts["by W"].keys()
    assert all(one["same tokens"] == one["of"] > 0 for one in contexts["by W"].values())
    assert found["profile"]["found"]["a prompt"]["kernels"] > 10


def test_what_was_measured_is_there_when_it_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    process = start([*COMMAND, str(file), "--tiny"])
    end = time.monotonic() + 150
    while len(lines_of(file)) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, 20)
    assert [line["item"] for line in lines_of(file)][:3] == ["machine", *list(ITEMS)[:2]]


def test_no_item_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    finished = run([*COMMAND, str(tmp_path / "gpu.jsonl"), "--tiny", "--seconds", "0"], 120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    machine, *others = lines_of(tmp_path / "gpu.jsonl")
    assert "found" in machine and [line["item"] for line in others] == list(ITEMS)
    assert all(line["not measured"] == "no time left of 0 s" for line in others)

"""Nothing imports beside the main thread: an import of the main thread would find modules half made."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launch import environment

GUARD = """
import importlib.util, sys, threading
foreign = set()
class Guard:
    def find_spec(self, name, path=None, target=None):
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            foreign.add(f"{thread.name} imports {name}")
sys.meta_path.insert(0, Guard())
threading.Thread(target=importlib.util.find_spec, args=["no_such_module"], name="probe").start()
"""
PROBE = "probe imports no_such_module"  # shows that the guard sees threads


def imports_beside_main(program: str) -> str:
    """What threads import in a new process that runs `program`; a line each."""
    code = f"{GUARD}{program}\nprint('\\n'.join(sorted(foreign)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.split("\n")
    assert PROBE in found, found
    return "\n".join(line for line in found if line not in (PROBE, ""))


def test_the_look_at_compile_locks():
    program = """
import os, time
from pathlib import Path
from ssgen_ds.distributed import compile_lock
compile_lock._NAP = 0.01
with compile_lock.without_stale_locks():
    time.sleep(0.3)
"""
    assert imports_beside_main(program) == ""


def test_the_store_the_watchdog_and_the_lock():
    """At both ends, and when a stranger speaks."""
    program = """
import socket, sys, time, tempfile
from pathlib import Path
from ssgen_ds.run import lock as run_lock
from ssgen_ds.distributed import watchdog
from ssgen_ds.recipe.schema import RecoveryConfig
from ssgen_ds.distributed.job_store import JobStore, StoreServer
from ssgen_ds.distributed.phases import Phases
from ssgen_ds.run.lock import RunLock
from ssgen_ds.distributed.signals import StopFlag
from ssgen_ds.distributed.watchdog import Watchdog
watchdog.BEAT_SECONDS = run_lock.BEAT_SECONDS = 0.05
server = StoreServer(socket.create_server(("127.0.0.1", 0)), b"secret")
dogs = []
for rank in (0, 1):
    store = JobStore(server.address, b"secret", 10)
    dogs.append(Watchdog(rank, 2, rank, "n", store, Phases(rank), StopFlag(), RecoveryConfig(), launched=True))
    dogs[-1].start()
lock = RunLock(Path(tempfile.mkdtemp()) / "run").acquire()
with socket.create_connection(server.address) as stranger:
    stranger.sendall(b"x" * 200)
    stranger.recv(1000)
    time.sleep(1)
lock.release()
for dog in dogs:
    dog.close()
server.close()
"""
    assert imports_beside_main(program) == ""


def test_tokenising_and_reading_ahead(tmp_path):
    """With a chat template, with prompts to be cut, and with rows that are wrong."""
    program = f"""
import json, sys
from pathlib import Path
from ssgen_ds.data import parts
from ssgen_ds.data.read_ahead import ReadAhead
from ssgen_ds.data.store import build_store
from ssgen_ds.data.stream import StreamPlan
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import CHATML, byte_tokenizer, data_config
folder = Path({str(tmp_path)!r})
rows = [{{"prompt": "word " * (1 + i % 30), "completion": "a"}} for i in range(1, 400)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>")
data = data_config(folder / "rows.jsonl", max_prompt_tokens=100)
parts.os.sched_getaffinity = lambda pid: {{0, 1}}
chat = ChatFormat(tokenizer, data)
assert len(build_store(data.train, data, chat, folder / "cache")) == 399
plan = StreamPlan(data.train, data, chat, 0, 8, buffer_examples=16)
plan.batch(1)
ahead = ReadAhead(plan, 2, 40)
for step in range(1, 41):
    assert len(ahead.batch(step)) == 8
(folder / "rows.jsonl").write_text("no JSON")
try:
    ReadAhead(StreamPlan(data.train, data, chat, 0, 8), 2, 40).batch(1)
    raise AssertionError("read it")
except UserError:
    pass
"""
    assert imports_beside_main(program) == ""


def test_what_writes_tensorboard_events(tmp_path):
    program = f"""
from pathlib import Path
from ssgen_ds.recipe.schema import LogConfig
from ssgen_ds.run.logbook import Logbook
with Logbook(Path({str(tmp_path)!r}), LogConfig(tensorboard=True), 0, "run") as logbook:
    for step in range(1, 40):
        logbook.log({{"step": step, "loss": 1.0}})
"""
    assert imports_beside_main(program) == ""


def test_a_process_group_from_its_beginning_to_its_end():
    """DeepSpeed is imported meanwhile, and an operator perhaps compiled."""
    program = """
from ssgen_ds.distributed.process_group import process_group
with process_group() as world:
    assert world.sum(1) == [1.0]
"""
    assert imports_beside_main(program) == ""

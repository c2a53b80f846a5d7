"""Each rank of `test_slow_tokenizing.py`: it prepares the data of a recipe by a tokenizer that takes its time.

slow_tokenizing_worker.py FOLDER DIE_AFTER     rank 0 kills itself at that row; 0: at none
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ssgen_ds.data import parts
from ssgen_ds.data.records import Record
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.distributed import watchdog
from ssgen_ds.distributed.launch import guarded
from ssgen_ds.distributed.process_group import process_group
from ssgen_ds.modeling.load import load_tokenizer
from ssgen_ds.recipe.schema import RecoveryConfig
from ssgen_ds.training.foundations import prepare_inputs
from tests.support.tiny_runs import tiny_recipe

PART_ROWS, ROW_SECONDS = 32, 0.08
LIMIT, PATIENCE = 3.0, 2  # seconds, the shortest that a recipe may ask for; and times that, while it prepares


def main(arguments: list[str]) -> None:
    folder, die_after = Path(arguments[0]), int(arguments[1])
    watchdog.SETUP_PATIENCE = PATIENCE
    parts.PART_ROWS = PART_ROWS
    encoded: list[str] = []
    one_at_a_time = threading.Lock()  # so that more cores are no faster
    encode = ChatFormat.encode

    def slowly(chat: ChatFormat, record: Record) -> Example:
        with one_at_a_time:
            time.sleep(ROW_SECONDS)
            encoded.append(record.id)
            if len(encoded) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
        return encode(chat, record)

    ChatFormat.encode = slowly  # type: ignore[method-assign]
    recipe = tiny_recipe(folder, folder / "run", data__train=str(folder / "rows.jsonl"))
    load_tokenizer(recipe.model)  # what it imports is no part of the time that is measured
    with process_group(RecoveryConfig(collective_timeout=LIMIT)) as world, world.phase("prepare"):
        began = time.monotonic()
        store = prepare_inputs(recipe, world).datasets.plan.store
        result = {"rows": len(store), "encoded": len(encoded), "seconds": time.monotonic() - began}
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(result))


guarded(main, sys.argv[1:])

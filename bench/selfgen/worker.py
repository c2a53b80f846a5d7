"""Runs rows in a process of its own: `python -m bench.selfgen.worker MODEL_PATH SIZES ROW,ROW OUT`, or on many ranks.

SIZES is JSON. Rank 0 rewrites OUT, {row: entry}, after each row. Standard output is for people.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.selfgen.sizes import RANK_ROWS, Sizes
from ssgen_ds.distributed.launch import guarded


def main(arguments: list[str]) -> None:
    from bench.selfgen import ranks, single
    from bench.selfgen.work import build_work
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.recipe.schema import RecoveryConfig

    path, sizes_text, names_text, out = arguments
    names = names_text.split(",")
    with process_group(RecoveryConfig(collective_timeout=600)) as world:
        work = world.main_first(lambda: build_work(path, Sizes(**json.loads(sizes_text))))
        if names[0] in RANK_ROWS:
            bench, functions = ranks.build_rank_bench(work, world), ranks.ROWS
        else:
            bench, functions = single.build_single_bench(work, world), single.ROWS
        entries = {}
        for name in names:
            row = functions[name](bench)
            if world.is_main:
                print(f"{name}: ours {row.ours}, peer {row.peer}", flush=True)
                entries[name] = row.to_json(name)
                Path(out).write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    guarded(main, sys.argv[1:])

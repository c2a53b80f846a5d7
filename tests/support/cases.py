"""Many cases in one spawn of ranks: `python -m torch.distributed.run ... -m tests.support.cases MODULE OUT`.

MODULE defines `CASES: dict[name, function(world, folder)]`. Every rank runs all of them in order and rank 0 writes
{name: {"result": Any, "seconds": float}} to OUT after each. The first failure ends the spawn and is left in OUT.error.
SSGEN_CASES=TEXT runs only the cases whose name contains it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path


def main(module: str, out: str) -> None:
    from ssgen_ds.config import RecoveryConfig
    from ssgen_ds.distributed import process_group
    from ssgen_ds.launch import quiet_libraries

    quiet_libraries()
    results = {}
    with process_group(RecoveryConfig(collective_timeout=300)) as world:
        for name, case in importlib.import_module(module).CASES.items():
            if os.environ.get("SSGEN_CASES", "") not in name:
                continue
            start = time.perf_counter()
            try:
                result = case(world, Path(out).parent)
            except BaseException:
                Path(f"{out}.error").write_text(f"{name}, rank {world.rank}:\n{traceback.format_exc()}", "utf-8")
                raise
            gc.collect()  # engines hold themselves in cycles; many cases share this process
            world.barrier()
            results[name] = {"result": result, "seconds": time.perf_counter() - start}
            if world.is_main:
                Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

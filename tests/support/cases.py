"""Many cases in one spawn of ranks: `python -m torch.distributed.run ... -m tests.support.cases MODULE OUT`.

MODULE defines `CASES: dict[name, function(world, folder)]`. Every rank runs all of them in order and rank 0 writes
{name: {"error": str | None, "result": Any, "seconds": float}} to OUT after each, so that a hang names its case.
A case that fails on one rank only is agreed on before the next one starts.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path


def main(module: str, out: str) -> None:
    from ssgen_ds.distributed import process_group
    from ssgen_ds.launch import quiet_libraries

    quiet_libraries()
    results = {}
    with process_group(timeout_seconds=300) as world:
        for name, case in importlib.import_module(module).CASES.items():
            start, result, error = time.perf_counter(), None, None
            try:
                result = case(world, Path(out).parent)
            except BaseException:
                error = f"rank {world.rank}:\n{traceback.format_exc()}"
            errors = [item for item in world.gather(error) if item]
            results[name] = {
                "error": "\n".join(errors) or None,
                "result": result,
                "seconds": time.perf_counter() - start,
            }
            if world.is_main:
                Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

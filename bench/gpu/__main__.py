"""Everything that a GPU can tell in one call: `python -m bench.gpu OUT.jsonl [--tiny] [--seconds 540]`.

One process, a random model built on the device, no file but the output. Each item is a line of JSON that is on the disk
before the next one begins: a call that is cut short leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ssgen_ds.distributed.launch import quiet_libraries, set_allocator


def main(out: Path, is_tiny: bool, seconds: float) -> None:
    begin = time.monotonic()
    quiet_libraries()
    set_allocator()
    from bench.gpu.items import ITEMS
    from bench.gpu.rig import TINY, Rig, Sizes
    from ssgen_ds.distributed.process_group import process_group

    with out.open("a", encoding="utf-8") as file, process_group() as world, TemporaryDirectory() as folder:
        rig = Rig(world, TINY if is_tiny else Sizes(), Path(folder))
        write(file, {"item": "machine", "found": machine(rig), "seconds": time.monotonic() - begin})
        for name, measure in ITEMS.items():
            started = time.monotonic()
            if started - begin > seconds:
                write(file, {"item": name, "not measured": f"no time left of {seconds:g} s"})
                continue
            try:
                line = {"item": name, "found": measure(rig)}
            except Exception as error:  # the next item may still tell something
                line = {"item": name, "error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
            write(file, {**line, "seconds": time.monotonic() - started})


def machine(rig: Any) -> dict[str, Any]:
    import torch

    packages = {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
    found = {"python": platform.python_version(), "packages": packages, "device": rig.world.device.type}
    if rig.world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def write(file: Any, line: dict[str, Any]) -> None:
    """On the disk when it returns."""
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())
    print(json.dumps(line)[:2000], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test on a CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which no item is begun")
    options = parser.parse_args()
    main(options.out, options.tiny, options.seconds)

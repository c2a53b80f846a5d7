"""What `ssgen bench` runs: python -m bench selfgen|train [--rows S1,S2,...] [--model smollm2] [--json]."""

from __future__ import annotations

import argparse
import sys

from ssgen_ds.errors import UserError


def main(arguments: list[str]) -> int:
    """Exit code 1: something that was asked for could not be measured. Raises UserError for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("what")
    parser.add_argument("--rows", default="")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",") if options.rows else None
    if options.what == "selfgen":
        from bench.selfgen.run import bench_selfgen

        return 0 if bench_selfgen(options.model, rows, options.json) else 1
    if options.what == "train":
        from bench.train.run import bench_train

        return 0 if bench_train(rows, options.json) else 1
    raise UserError(f"no benchmark {options.what!r}; there are: selfgen, train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

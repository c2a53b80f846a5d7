"""What a step and a round read and write does not grow with the run: bytes of this process, counted by the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssgen_ds.recipe.schema import LogConfig
from ssgen_ds.run.layout import round_path
from ssgen_ds.run.logbook import Logbook
from ssgen_ds.selfgen.generated import Draft, Generated, Slot
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.round_file import write_round
from tests.unit.selfgen.test_history import Rank
from tests.unit.selfgen.test_samples import Example, Words, describe_records

COUNTERS = Path("/proc/self/io")
ROUNDS, EXAMPLES, STEPS = 320, 4, 5  # examples and steps of a round


def transferred() -> dict[str, int]:
    lines = COUNTERS.read_text().splitlines()
    return {name: int(count) for name, count in (line.split(": ") for line in lines)}


@pytest.mark.skipif(not COUNTERS.exists(), reason="reads Linux's counters")
def test_bytes_of_a_round_do_not_grow(tmp_path):
    history, cost = History(tmp_path, Rank(True, [])), []
    (tmp_path / "selfgen").mkdir()
    with Logbook(tmp_path, LogConfig(tensorboard=True), 0, "run") as logbook:
        for number in range(1, ROUNDS + 1):
            before = transferred()
            # Each example comes again 100 rounds later: a look-up is of examples that many rounds have visited.
            ids = [f"e{(number * EXAMPLES + i) % (100 * EXAMPLES)}" for i in range(EXAMPLES)]
            found = history.before(number, [f"e{i}" for i in range(0, 100 * EXAMPLES, 10)])
            assert number <= 100 or len(found) == 40
            slots = [Slot(number, Example(name, list(range(50)), None, [2] * 30, False, "r"), 0, 0.1) for name in ids]
            records = [Generated(number, name, 0, 0.1, [2] * 30, draft=Draft([3] * 30, None, 30)) for name in ids]
            write_round(round_path(tmp_path, number), records)
            describe_records(tmp_path, number, slots, records, Words())
            for step in range(STEPS):
                logbook.log({"step": (number - 1) * STEPS + step + 1, "loss": 1.0, "lr": 1e-5})
            after = transferred()
            cost.append([after[name] - before[name] for name in ("rchar", "wchar")])
    for early, late in zip(mean(cost[100:150]), mean(cost[-50:]), strict=True):
        assert late < 1.2 * early + 2000, (early, late)
    # What was read whole would stand out.
    assert (tmp_path / "selfgen" / "samples.jsonl").stat().st_size > mean(cost[100:150])[0]


def mean(costs: list[list[int]]) -> list[float]:
    return [sum(column) / len(costs) for column in zip(*costs, strict=True)]

"""Who trains on what, when: partitions, mixtures, and independence of the number of ranks."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssgen_ds.data.plan import Purpose, StepPlan, permutation
from ssgen_ds.data.store import build_store
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.recipe.schema import SourceConfig
from tests.unit.data.helpers import data_config


@pytest.fixture
def plan_of(chatml, tmp_path: Path):
    """A plan over sources given as (rows, weight)."""

    def build(*sources: tuple[int, float], seed: int = 0, global_batch: int = 4) -> StepPlan:
        entries = []
        for number, (count, weight) in enumerate(sources):
            file = tmp_path / f"{number}-{count}.jsonl"
            if not file.exists():
                rows = [{"prompt": f"{number}", "completion": "a", "id": f"{number}-{i}"} for i in range(count)]
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            entries.append(SourceConfig(path=str(file), weight=weight))
        data = data_config(*entries)
        return StepPlan(build_store(entries, data, ChatFormat(chatml, data), tmp_path / "cache"), seed, global_batch)

    return build


def epoch_of(plan: StepPlan, epoch: int) -> list[tuple[str, int]]:
    """(id, visit) of every item of an epoch, in order."""
    first = epoch * plan.steps_per_epoch + 1
    return [(i.example.id, i.visit) for step in range(first, first + plan.steps_per_epoch) for i in plan.batch(step)]


def test_an_epoch_is_every_example_once_and_epochs_differ(plan_of) -> None:
    plan = plan_of((10, 1.0))
    assert plan.steps_per_epoch == 3
    assert [len(plan.batch(step)) for step in range(1, 5)] == [4, 4, 2, 4]  # the last window is kept
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert sorted(first) == sorted((f"0-{i}", 0) for i in range(10))
    assert sorted(second) == sorted((f"0-{i}", 1) for i in range(10))
    assert [i for i, _ in first] != [i for i, _ in second] != sorted(i for i, _ in second)
    assert [plan.epoch(step) for step in (1, 3, 4)] == [0, 0, 1]
    assert {item.epoch for item in plan.batch(4)} == {1}


def test_steps_are_random_access_and_depend_on_the_seed_alone(plan_of) -> None:
    plan, again, other = plan_of((10, 1.0)), plan_of((10, 1.0)), plan_of((10, 1.0), seed=1)
    forward = [plan.batch(step) for step in range(1, 8)]
    assert [again.batch(step) for step in reversed(range(1, 8))] == forward[::-1]
    assert [other.batch(step) for step in range(1, 8)] != forward


def test_mixture_by_hand(plan_of) -> None:
    plan = plan_of((6, 2.0), (4, 0.5), (3, 1.0))
    assert plan.examples_per_epoch == 12 + 2 + 3
    halves = []
    for epoch in range(4):
        visits = epoch_of(plan, epoch)
        assert len(set(visits)) == len(visits)  # every occurrence has its own samples
        counts = Counter(identifier for identifier, _ in visits)
        assert [counts[f"0-{i}"] for i in range(6)] == [2] * 6
        assert [counts[f"2-{i}"] for i in range(3)] == [1] * 3
        assert {visit for identifier, visit in visits if identifier == "0-0"} == {2 * epoch, 2 * epoch + 1}
        halves.append({identifier for identifier in counts if identifier.startswith("1-")})
    assert halves[0] | halves[1] == {f"1-{i}" for i in range(4)} == halves[2] | halves[3]
    assert [len(half) for half in halves] == [2] * 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    weights=st.lists(st.floats(0.05, 3.5), min_size=1, max_size=3),
    seed=st.integers(0, 2**31 - 1),
    global_batch=st.integers(1, 9),
)
def test_mixtures_visit_in_proportion(plan_of, weights: list[float], seed: int, global_batch: int) -> None:
    plan = plan_of(*((10, weight) for weight in weights), seed=seed, global_batch=global_batch)
    seen: Counter[str] = Counter()
    all_visits = set()
    for epoch in range(3):
        visits = epoch_of(plan, epoch)
        assert len(visits) == plan.examples_per_epoch and all_visits.isdisjoint(visits)
        all_visits.update(visits)
        assert len(set(visits)) == len(visits)
        seen.update(identifier for identifier, _ in visits)
    for number, weight in enumerate(weights):
        counts = [seen[f"{number}-{i}"] for i in range(10)]
        assert max(counts) - min(counts) <= 1  # a share rotates; nothing is left behind
        assert abs(sum(counts) - 30 * weight) <= 3 * 1.0


PINNED = [1, 4, 6, 2, 7, 0, 3, 5]


def test_permutation_is_pinned() -> None:
    """Resume relies on the order: it must not change with numpy or by accident."""
    assert permutation(7, 8, Purpose.EPOCH_ORDER, 2).tolist() == PINNED
    assert sorted(permutation(7, 8, Purpose.EPOCH_ORDER, 3)) == list(range(8))
    assert permutation(7, 8, Purpose.EPOCH_ORDER, 3).tolist() != PINNED

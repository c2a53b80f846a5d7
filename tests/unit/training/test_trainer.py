"""The cadence, without a model: rates, rounds and seeds of a step, rounds of a resume, skipped updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssgen_ds.checkpoint.save import Saved, TrainState
from ssgen_ds.data.plan import Item
from ssgen_ds.data.records import Record
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.data.window import Packing, Sequence
from ssgen_ds.errors import NonFiniteError, StopRequested
from ssgen_ds.evaluate.gold_loss import GoldLoss
from ssgen_ds.evaluate.while_training import TrainingEvaluation
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.run.layout import round_path
from ssgen_ds.selfgen.bss import context_sequence
from ssgen_ds.selfgen.generated import Generated, Mixed, Slot
from ssgen_ds.selfgen.round_file import read_round, write_round
from ssgen_ds.selfgen.rounds import RoundStats
from ssgen_ds.training import saver as saver_module
from ssgen_ds.training import trainer as module
from ssgen_ds.training.rounds import Rounds
from ssgen_ds.training.saver import Saver
from ssgen_ds.training.schedules import mix_rate_at
from ssgen_ds.training.step import StepStats
from ssgen_ds.training.trainer import Trainer, step_seed
from tests.support.alone import alone
from tests.support.tiny_models import tiny_tokenizer

STEPS, EVERY = 7, 3  # rounds of steps 1-3, 4-6 and 7
RATES = [mix_rate_at(step, STEPS, 0.6, "linear") for step in range(1, STEPS + 1)]


@dataclass
class Generator:
    """Contexts that are gold throughout; remembers what it was asked for."""

    chat: ChatFormat
    asked: list[list[Slot]] = field(default_factory=list)
    uses_earlier: bool = False

    def generate(self, slots: list[Slot], progress: Any, earlier: dict[str, Generated]):
        self.asked.append(slots)
        return [self.record(slot) for slot in slots], RoundStats(seconds=1.0, block="1")

    def record(self, slot: Slot) -> Generated:
        gold = slot.example.response_ids
        mixed = Mixed([False] * len(gold), gold, 0)
        return Generated(slot.step, slot.example.id, slot.visit, slot.mix_rate, gold, mixed)

    def sequences(self, slot: Slot, record: Generated) -> list[Sequence]:
        return [context_sequence(slot.example, record.context_ids)]


class Messages:
    """A progress display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def generating(self, *_: Any) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...


@dataclass
class Rows:
    """A logbook in memory."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def make(tmp_path: Path, step: int = 0, resumed_round: Path | None = None, **train: Any) -> Trainer:
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "method": {"name": "bss", "bss": {"mix_rate": 0.6, "schedule": "linear"}},
            "selfgen": {"refresh_every": EVERY},
            "train": {"max_steps": STEPS, "global_batch": 2, "seed": 5, **train},
            "output_dir": str(tmp_path / "run"),
        }
    )
    chat = ChatFormat(tiny_tokenizer(), recipe.data)
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "red cat"}]
    examples = [chat.encode(Record(f"id-{i}", turns, "here", "hash")) for i in range(2)]

    def batch(step: int) -> list[Item]:
        return [Item(i, example, visit=step, epoch=step) for i, example in enumerate(examples)]

    world, plan, generator = alone(), SimpleNamespace(batch=batch, epoch=lambda step: step), Generator(chat)
    progress, logbook = Messages(), Rows()
    blocks = SimpleNamespace(sampler=SimpleNamespace(world=world))
    gold = GoldLoss(None, [], Packing(2), world)
    evaluation = TrainingEvaluation(recipe, chat, blocks, [], gold, STEPS, progress, logbook)
    saver = Saver(None, recipe, world, step, spared=evaluation.best.step)
    return Trainer(
        recipe=recipe,
        world=world,
        engine=None,
        plan=plan,
        generator=generator,
        rounds=Rounds(recipe, world, plan, generator, None, saver, progress, STEPS, resumed_round),
        evaluation=evaluation,
        saver=saver,
        state=TrainState(step, 0, "data", "tokenizer", 1, 0, {}),
        total_steps=STEPS,
        logbook=logbook,
        progress=progress,
        packing=Packing(2),
    )


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_an_example_uses_the_rate_of_the_step_that_trains_on_it(tmp_path):
    """Not that of the round's first step."""
    trainer = make(tmp_path)
    opened = trainer.rounds.at(1)
    assert {step: {slot.mix_rate for slot in group} for step, group in opened.slots.items()} == {
        step: {RATES[step - 1]} for step in (1, 2, 3)
    }
    assert {step: [record.mix_rate for record in group] for step, group in opened.records.items()} == {
        step: [RATES[step - 1]] * 2 for step in (1, 2, 3)
    }
    assert len(set(RATES)) == STEPS


def test_the_last_round_ends_with_the_run(tmp_path):
    assert list(make(tmp_path, step=6).rounds.at(7).slots) == [7]


def test_a_round_in_progress_is_read_back_and_the_next_is_generated(tmp_path):
    """The copy of the checkpoint counts, not the file of the run: that one may be of a later, abandoned attempt."""
    generated = [record for group in make(tmp_path).rounds.at(1).records.values() for record in group]
    mine = [replace(record, mixed=replace(record.mixed, ids=[9, *record.mixed.ids[1:]])) for record in generated]
    copy = tmp_path / "checkpoint" / "round.parquet"
    write_round(copy, mine)
    trainer = make(tmp_path, step=1, resumed_round=copy)
    read = trainer.rounds.at(2)
    assert trainer.generator.asked == []
    assert list(read.slots) == [1, 2, 3]
    assert [record for group in read.records.values() for record in group] == mine
    assert read.stats == RoundStats()
    assert read_round(round_path(Path(trainer.recipe.output_dir), 1)) == mine, "the run's file is what was trained on"
    later = trainer.rounds.at(4)
    assert [[slot.step for slot in asked] for asked in trainer.generator.asked] == [[4, 4, 5, 5, 6, 6]]
    assert later.records[4][0].mixed.ids[0] != 9


def test_a_resume_between_two_rounds_generates(tmp_path):
    """The checkpoint's copy is then that of the round before."""
    copy = tmp_path / "round.parquet"
    write_round(copy, [])
    trainer = make(tmp_path, step=3, resumed_round=copy)
    trainer.rounds.at(4)
    assert len(trainer.generator.asked) == 1


def test_a_round_that_ended_early_gets_what_it_lacks(tmp_path):
    """The run was to end after step 4, and now goes on in the same round."""
    whole = make(tmp_path).rounds.at(4)
    copy = tmp_path / "round.parquet"
    write_round(copy, whole.records[4])
    trainer = make(tmp_path, step=4, resumed_round=copy)
    found = trainer.rounds.at(5)
    assert [[slot.step for slot in asked] for asked in trainer.generator.asked] == [[5, 5, 6, 6]]
    assert found.records == whole.records


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeds(monkeypatch) -> list[int]:
    """torch's seed at each step; nothing is trained and nothing is saved."""
    found: list[int] = []

    def train_step(engine: Any, window: Any, lr: float, world: Any, replays: Any) -> StepStats:
        found.append(torch.initial_seed())
        return StepStats(1.0, 1.0)

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(saver_module, "save_checkpoint", lambda *arguments, **named: Saved(1.0, 8))
    return found


def test_dropout_has_a_seed_of_each_step_whatever_came_before(tmp_path, seeds):
    with torch.random.fork_rng(devices=[]):
        make(tmp_path).fit()
        torch.rand(3)
        make(tmp_path, step=4).fit()
    assert len(set(seeds[:STEPS])) == STEPS
    assert seeds[STEPS:] == seeds[4:STEPS]
    assert seeds[:STEPS] == [step_seed(5, step, 0) for step in range(1, STEPS + 1)]


def test_dropout_seeds_differ_by_seed_step_and_rank():
    keys = [(seed, step, rank) for seed in (0, 1, 11) for step in (0, 1, 11) for rank in (0, 1, 11)]
    assert len({step_seed(*key) for key in keys}) == len(keys)
    assert step_seed(5, 1, 0) == 67_502_153_319_374_411, "as in the first release: its runs go on bitwise"


def test_rows_tell_the_step_its_round_and_its_rate(tmp_path, seeds):
    """The cost of a round is on the row of its first step alone."""
    trainer = make(tmp_path)
    with torch.random.fork_rng(devices=[]):
        trainer.fit()
    rows = trainer.logbook.rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["round"] for row in rows] == [1, 1, 1, 2, 2, 2, 3]
    assert [row["mix_rate"] for row in rows] == RATES
    assert [row["selfgen_seconds"] for row in rows] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert (trainer.state.step, trainer.state.round) == (7, 3)


def test_a_stop_saves_the_step_it_ends_at(tmp_path, seeds):
    trainer = make(tmp_path)
    trainer.world.stop.is_set = True
    with torch.random.fork_rng(devices=[]), pytest.raises(StopRequested, match="step 1"):
        trainer.fit()
    assert (trainer.saver.step, len(seeds)) == (1, 1)


# -- skipped updates ---------------------------------------------------------------------------------------------------

BAD = StepStats(math.nan, math.nan, is_applied=False)
GOOD = StepStats(1.0, 1.0)


def count(trainer: Trainer, *stats: StepStats) -> tuple[int, int]:
    for one in stats:
        trainer._count_skipped(one, trainer.rounds.slots_of(1))
    return trainer.state.skipped, trainer.state.skipped_in_row


def test_an_applied_update_ends_the_row_of_skipped_ones(tmp_path):
    """Two in a row are allowed; four, never three of them in a row, are no reason to end."""
    trainer = make(tmp_path, max_skipped_steps=2)
    assert count(trainer, BAD, BAD) == (2, 2)
    assert count(trainer, GOOD) == (2, 0)
    assert count(trainer, BAD, BAD) == (4, 2)
    assert len(trainer.progress.lines) == 4
    with pytest.raises(NonFiniteError, match=r"3 in a row.*max_skipped_steps is 2.*id-0, id-1"):
        count(trainer, BAD)


def test_the_row_goes_on_over_a_restart(tmp_path):
    trainer = make(tmp_path, max_skipped_steps=2)
    trainer.state = replace(trainer.state, skipped=5, skipped_in_row=2)
    with pytest.raises(NonFiniteError):
        count(trainer, BAD)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_save_spares_the_best_step_and_takes_the_round_along(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(saver_module, "save_checkpoint", lambda *arguments, **named: asked.append((arguments, named)))
    saver = replace(make(tmp_path, step=3).saver, spared=lambda: 2)
    new = TrainState(4, 2, "data", "tokenizer", 1, 0, {})
    saver.save(new)
    saver.save(new)
    (((_, run_dir, state, round_file), named),) = asked  # a step is saved once
    assert (run_dir, state, saver.step) == (tmp_path / "run", new, 4)
    assert round_file == round_path(run_dir, 2)
    assert (named["keep"], named["spared"]) == (saver.recipe.checkpoint.keep, 2)

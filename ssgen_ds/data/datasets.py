"""From a recipe to what training and evaluation read: the step plan, the evaluation examples, the prompts to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ssgen_ds.data.messages import extra_fields
from ssgen_ds.data.plan import Item, Purpose, StepPlan, permutation
from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import BadRows, Record, RecordMaker, read_rows
from ssgen_ds.data.repeats import numbered
from ssgen_ds.data.store import Store, Summary, build_store, split_store
from ssgen_ds.data.stream import StreamPlan
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import Problems, UserError
from ssgen_ds.recipe.schema import DataConfig, Recipe, SourceConfig

__all__ = [
    "Datasets", "Item", "StepPlan", "StreamPlan", "build_datasets", "read_prompts", "read_questions",
]  # fmt: skip

FIRST_ROWS = 100  # of a source: what is looked at when training is refused for another reason


@dataclass
class Datasets:
    """What a run reads. fingerprint: hex over the training examples in order. summary: counts, ready for JSON."""

    plan: StepPlan | StreamPlan
    evaluation: Sequence[Example]
    fingerprint: str
    summary: dict[str, Any]
    longest: int  # tokens of the longest training example; where that is not known, of what the recipe allows

    def steps_of(self, epochs: int) -> int:
        """Optimizer steps of so many epochs. A stream has no length: its recipe says `max_steps`."""
        assert isinstance(self.plan, StepPlan)
        return epochs * self.plan.steps_per_epoch


def build_datasets(
    recipe: Recipe, chat: ChatFormat, cache_dir: Path, tick: Callable[[], None] = lambda: None
) -> Datasets:
    """Prepare the training and evaluation data of a recipe; stores are kept in `cache_dir` and reused.

    At most `eval.max_examples` are evaluated, chosen by the seed. `tick` is called as it goes on.
    Raises UserError for anything wrong with the data.
    """
    data, train = recipe.data, recipe.train
    evaluation = build_store(data.eval, data, chat, cache_dir, "data.eval", tick) if data.eval else None
    if data.streaming:
        plan: StepPlan | StreamPlan = StreamPlan(data.train, data, chat, train.seed, train.global_batch)
        plan.batch(1)  # a bad path or column must be found before weights load
        sources = [source.model_dump(mode="json") for source in data.train]
        fingerprint = hashlib.blake2b(json.dumps([sources, chat.fingerprint()]).encode(), digest_size=16).hexdigest()
        summary: dict[str, Any] = {"streaming": True}
    else:
        store = build_store(data.train, data, chat, cache_dir, tick=tick)
        summary = _counts(store)
        if data.eval_fraction:
            store, evaluation = split_store(store, data.eval_fraction)
        plan = StepPlan(store, train.seed, train.global_batch)
        fingerprint = store.fingerprint
        summary |= {"train_examples": len(store), "steps_per_epoch": plan.steps_per_epoch}
    if evaluation is not None:
        if data.eval:
            summary["eval"] = _counts(evaluation)
        evaluation = _sample(evaluation, recipe.eval.max_examples, train.seed)
    summary["eval_examples"] = 0 if evaluation is None else len(evaluation)
    allowed = data.max_prompt_tokens + data.max_response_tokens
    longest = allowed if data.streaming else store.longest
    return Datasets(plan, [] if evaluation is None else evaluation, fingerprint, summary, longest)


def check_first_rows(data: DataConfig, chat: ChatFormat) -> None:
    """Whether the first rows of every source can be trained on. Raises UserError with those that cannot."""
    problems = Problems()
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for source in sources:
            problems.ask(partial(_check_first_rows, source, data, chat, key))
    problems.refuse()


def _check_first_rows(source: SourceConfig, data: DataConfig, chat: ChatFormat, key: str) -> None:
    bad = BadRows()
    for _ in _encoded(islice(read_rows(source, key), FIRST_ROWS), RecordMaker(source, data, key), chat, bad):
        pass
    if bad.total and data.on_bad_row == "error":
        raise bad.error(key)


def _encoded(
    rows: Iterable[tuple[str, Any]], make_record: RecordMaker, chat: ChatFormat, bad: BadRows
) -> Iterator[tuple[Record, Example]]:
    """Records and their tokens. Rows that are wrong are noted in `bad`; too long ones are left out."""
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            record = make_record(where, row)
            example = chat.encode(record)
        except OverLength:
            continue
        except BadRow as problem:
            bad.add(where, problem)
        else:
            yield record, example


def read_prompts(data: DataConfig, chat: ChatFormat, key: str = "--data") -> list[Example]:
    """The examples of `data.train` in file order, to be answered; a row needs no response (then `gold_text` is "")."""
    return read_questions(data, chat, key)[0]


def read_questions(
    data: DataConfig, chat: ChatFormat, key: str = "--data"
) -> tuple[list[Example], list[tuple[str, ...]]]:
    """The examples of `data.train` in file order, to be answered, and the gold answers of each.

    A row needs no response: then `gold_text` is "" and there are no gold answers. It may have several, as a list.
    """
    examples, gold_texts, bad = [], [], BadRows()
    for source in data.train:
        make_record = RecordMaker(source, data, key, needs_response=False)
        for record, example in _encoded(read_rows(source, key), make_record, chat, bad):
            examples.append(example)
            content = None if extra_fields(record.messages[-1]) else record.messages[-1]["content"]
            # Answers are compared with what the model is to say: not with what its prompt has opened for it.
            gold_texts.append(tuple(example.gold_text if t == content else t for t in record.gold_texts))
    if bad.total and data.on_bad_row == "error":
        raise bad.error(key)
    if not examples:
        raise UserError(f"{key}: no prompt to answer in {', '.join(source.path for source in data.train)}")
    ids = numbered(example.id for example in examples)
    return [replace(example, id=name) for example, name in zip(examples, ids, strict=True)], gold_texts


def _counts(store: Store) -> dict[str, Any]:
    summary: Summary = store.summary
    return {**asdict(summary), "skipped": str(store.folder / "skipped.txt")}


def _sample(store: Store, limit: int, seed: int) -> Store:
    """At most `limit` examples in their own order, the same for every run of one seed."""
    if len(store) <= limit:
        return store
    return store.part(np.sort(permutation(seed, len(store), Purpose.EVALUATION)[:limit]))

"""From a recipe to what training and evaluation read: the step plan, the evaluation examples, the prompts to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssgen_ds.config import DataConfig, Recipe
from ssgen_ds.data.plan import Draw, Item, StepPlan, permutation, shard_by_length
from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import BadRows, RecordMaker, read_rows
from ssgen_ds.data.store import Store, Summary, build_store, split_store
from ssgen_ds.data.stream import StreamPlan
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import UserError

__all__ = [
    "Datasets", "Item", "StepPlan", "StreamPlan", "build_datasets", "read_prompts", "read_questions", "shard_by_length",
]  # fmt: skip


@dataclass
class Datasets:
    """What a run reads. fingerprint: hex over the training examples in order. summary: counts, ready for JSON."""

    plan: StepPlan | StreamPlan
    evaluation: Sequence[Example]
    fingerprint: str
    summary: dict[str, Any]
    longest: int  # tokens of the longest training example; where that is not known, of what the recipe allows


def build_datasets(recipe: Recipe, chat: ChatFormat, cache_dir: Path) -> Datasets:
    """Prepare the training and evaluation data of a recipe; stores are kept in `cache_dir` and reused.

    At most `eval.max_examples` are evaluated, chosen by the seed. Raises UserError for anything wrong with the data.
    """
    data, train = recipe.data, recipe.train
    evaluation = build_store(data.eval, data, chat, cache_dir, key="data.eval") if data.eval else None
    if data.streaming:
        plan: StepPlan | StreamPlan = StreamPlan(data.train, data, chat, train.seed, train.global_batch)
        plan.batch(0)  # a bad path or column must be found before weights load
        sources = [source.model_dump(mode="json") for source in data.train]
        fingerprint = hashlib.blake2b(json.dumps([sources, chat.fingerprint()]).encode(), digest_size=16).hexdigest()
        summary: dict[str, Any] = {"streaming": True}
    else:
        store = build_store(data.train, data, chat, cache_dir)
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


def read_prompts(data: DataConfig, chat: ChatFormat, key: str = "--data") -> list[Example]:
    """The examples of `data.train` in file order, to be answered; a row needs no response (then `reference` is "")."""
    return read_questions(data, chat, key)[0]


def read_questions(
    data: DataConfig, chat: ChatFormat, key: str = "--data"
) -> tuple[list[Example], list[tuple[str, ...]]]:
    """The examples of `data.train` in file order, to be answered, and the references of each.

    A row needs no response: then `reference` is "" and there are no references. It may have several, as a list.
    """
    examples, references, bad = [], [], BadRows()
    for source in data.train:
        make_record = RecordMaker(source, data, key, needs_response=False)
        for where, row in read_rows(source, key):
            try:
                if isinstance(row, BadRow):
                    raise row
                record = make_record(where, row)
                examples.append(chat.encode(record))
                references.append(record.references)
            except OverLength:
                continue
            except BadRow as problem:
                bad.add(where, problem)
    if bad.total and data.on_bad_row == "error":
        raise bad.error(key)
    if not examples:
        raise UserError(f"{key}: no prompt to answer in {', '.join(source.path for source in data.train)}")
    return examples, references


def _counts(store: Store) -> dict[str, Any]:
    summary: Summary = store.summary
    return {**asdict(summary), "skipped": str(store.folder / "skipped.txt")}


def _sample(store: Store, limit: int, seed: int) -> Store:
    """At most `limit` examples in their own order, the same for every run of one seed."""
    if len(store) <= limit:
        return store
    return store.part(np.sort(permutation(seed, len(store), Draw.EVALUATION)[:limit]))

"""From predictions to what an evaluation says: scores with intervals, behaviour, and what the corrections did.

A prediction is one line of the predictions file:

    {"index": 0, "id": "a1", "sample": 0, "prompt": "...", "references": ["..."], "turns": ["draft", "correction"],
     "prediction": "correction", "stopped": true, "num_tokens": 9, "reference_tokens": 11,
     "scores": {"rougeL": 0.5}, "first_scores": {"rougeL": 0.4}}

An example with several sampled answers counts once, with the mean of their scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.inference.answers import Answer
from ssgen_ds.metrics.intervals import difference, interval
from ssgen_ds.metrics.scorer import Scorer

Prediction = dict[str, Any]
_NGRAM = 4  # words; of `repetition`


def summarize(predictions: list[Prediction], names: list[str]) -> dict[str, Any]:
    """`scores`, `behaviour` and `correction` (None when nothing was corrected) of at least one prediction."""
    corrected = any(len(one["turns"]) > 1 for one in predictions)
    return {
        "scores": {name: asdict(interval(by_example(predictions, "scores", name))) for name in names},
        "behaviour": behaviour(predictions),
        "correction": correction(predictions, names) if corrected else None,
    }


def by_example(predictions: list[Prediction], which: str, name: str) -> list[float]:
    """One value for each example, in the order of the predictions."""
    groups: dict[int, list[float]] = {}
    for one in predictions:
        groups.setdefault(one["index"], []).append(one[which][name])
    return [float(np.mean(group)) for group in groups.values()]


def behaviour(predictions: list[Prediction]) -> dict[str, float | None]:
    """How the answers are, whatever they say.

    eos_rate: share that ended by themselves. length_ratio: tokens of all answers over tokens of their (first)
    gold answers, None where there are none. repetition: share of 4-grams of words that occurred earlier in the answer.
    """
    with_gold = [one for one in predictions if one["reference_tokens"]]
    wanted = sum(one["reference_tokens"] for one in with_gold)
    return {
        "eos_rate": _mean(predictions, lambda one: one["stopped"]),
        "length_ratio": sum(one["num_tokens"] for one in with_gold) / wanted if wanted else None,
        "repetition": _mean(predictions, lambda one: repetition(one["prediction"])),
        "empty_rate": _mean(predictions, lambda one: not one["prediction"].strip()),
        "mean_tokens": _mean(predictions, lambda one: one["num_tokens"]),
    }


def repetition(text: str) -> float:
    """Share of 4-grams of words that occur earlier in the text; 0 for a text too short to have two."""
    words = text.split()
    grams = Counter(tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1))
    total = grams.total()
    return 1 - len(grams) / total if total else 0.0


def correction(predictions: list[Prediction], names: list[str]) -> dict[str, Any]:
    """First answers against last ones, paired: the change of each score, and which answers became right or wrong.

    An answer is right when its score is 1; `wrong_to_right` and `right_to_wrong` count answers, `improved` and
    `worsened` those whose score rose or fell at all.
    """
    pairs = {name: [(one["first_scores"][name], one["scores"][name]) for one in predictions] for name in names}
    return {
        "first": {name: asdict(interval(by_example(predictions, "first_scores", name))) for name in names},
        "change": {
            name: asdict(
                difference(by_example(predictions, "first_scores", name), by_example(predictions, "scores", name))
            )
            for name in names
        },
        "improved": _count(pairs, lambda first, last: last > first),
        "worsened": _count(pairs, lambda first, last: last < first),
        "wrong_to_right": _count(pairs, lambda first, last: first < 1 <= last),
        "right_to_wrong": _count(pairs, lambda first, last: last < 1 <= first),
        "unchanged_share": _mean(predictions, lambda one: one["turns"][0] == one["turns"][-1]),
    }


def _count(pairs: dict[str, list[tuple[float, float]]], holds: Callable[[float, float], bool]) -> dict[str, int]:
    return {name: sum(holds(first, last) for first, last in values) for name, values in pairs.items()}


def _mean(predictions: list[Prediction], value: Callable[[Prediction], float]) -> float:
    return float(np.mean([float(value(one)) for one in predictions]))


def predictions_of(
    index: int,
    example: Example,
    gold_texts: tuple[str, ...],
    answers: list[Answer],
    chat: ChatFormat,
    scorer: Scorer,
) -> list[Prediction]:
    """The answers to one example as lines of the predictions file."""
    rows = []
    for sample, given in enumerate(answers):
        turns = [chat.decode(ids) for ids in given.turns]
        scores = scorer(turns[-1], gold_texts) if gold_texts else {}
        row: Prediction = {
            "index": index,
            "id": example.id,
            "sample": sample,
            "prompt": chat.decode(example.prompt_ids),
            "references": list(gold_texts),
            "prediction": turns[-1],
            "turns": turns,
            "stopped": given.stopped[-1],
            "num_tokens": given.num_tokens[-1],
            "reference_tokens": len(example.response_ids) if gold_texts else 0,
            "scores": scores,
        }
        # A first answer that was not corrected is its own last one.
        row["first_scores"] = scorer(turns[0], gold_texts) if gold_texts and turns[0] != turns[-1] else scores
        rows.append(row)
    return rows

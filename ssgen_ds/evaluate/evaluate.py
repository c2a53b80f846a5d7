"""`ssgen evaluate`: answer the prompts of a file, score the answers, and estimate how sure the scores are.

F.json has the scores. F.predictions.jsonl has every answer with its scores. Answers are kept as they come: the same
command continues where an earlier one was stopped or killed, on any number of ranks.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ssgen_ds.errors import GenerationInterrupted, Problems, StopRequested, UserError
from ssgen_ds.evaluate.journal import Journal
from ssgen_ds.evaluate.result_file import all_settings, find_result_file, result_identity, step_of_model
from ssgen_ds.evaluate.summary import predictions_of, summarize
from ssgen_ds.inference.answers import Answer, AnswerSettings, answer
from ssgen_ds.inference.session import Inference, InferenceSettings, Ticker, check_samples, open_inference
from ssgen_ds.metrics.scorer import Scorer
from ssgen_ds.run.files import write_json, write_lines
from ssgen_ds.run.layout import predictions_file
from ssgen_ds.sampler.block import BlockChooser

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World

CHUNK = 2  # batches that are answered between two writes


def evaluate(where: InferenceSettings, how: AnswerSettings, metrics: list[str], out: Path | None) -> None:
    """Join the ranks and evaluate; see `evaluate_in`."""
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.distributed.signals import stop_on_signals

    with stop_on_signals() as stop, process_group(stop=stop) as world:
        evaluate_in(world, where, how, metrics, out)


def evaluate_in(
    world: World, where: InferenceSettings, how: AnswerSettings, metrics: list[str], out: Path | None
) -> None:
    """Write scores and predictions. Every input is checked before any weight is loaded.

    Raises, on all ranks together:
        UserError: wrong input, or rows without a reference while metrics are asked for.
        StopRequested: on a signal; the answers so far are kept.
    """
    problems = Problems()
    found_scorer = problems.ask(lambda: Scorer(metrics))
    problems.ask(lambda: check_samples(how.samples, how.temperature))
    inference = open_inference(where, world, problems)
    assert found_scorer is not None
    scorer = found_scorer

    def find() -> tuple[Path, str]:
        identity = result_identity(inference, how, scorer.names, out)
        return find_result_file(out, inference, how, metrics, identity), identity

    problems.ask(lambda: inference.check_lengths(how.max_new_tokens, how.correct))
    problems.ask(lambda: _check_references(inference, scorer))
    found = problems.ask(find) if world.is_main else None
    world.together(problems.refuse)
    file, identity = cast(tuple[Path, str], world.broadcast(found))
    began = time.perf_counter()
    with Journal(file, _identity(inference, how, scorer), world, group=how.samples) as journal:
        _answer_the_rest(inference, how, scorer, journal)
        seconds = time.perf_counter() - began
        world.together(
            lambda: _finish(inference, how, scorer, journal, file, identity, seconds) if world.is_main else None
        )
    inference.say_what_was_cut()


def _answer_the_rest(inference: Inference, how: AnswerSettings, scorer: Scorer, journal: Journal) -> None:
    world, examples = inference.world, inference.examples
    done = journal.num_rows // how.samples
    if done == len(examples):
        return
    sampler = inference.load()
    blocks = inference.blocks(sampler)
    size = max(1, CHUNK * sampler.limit.rows * world.size // how.samples)
    with sampler.ready():  # parameters that are gathered stay so between the chunks
        for begin in range(done, len(examples), size):
            end = min(begin + size, len(examples))
            answers = _answer_some(inference, how, blocks, begin, end)
            world.together(partial(_keep, inference, scorer, journal, begin, answers))


def _answer_some(
    inference: Inference, how: AnswerSettings, blocks: BlockChooser, begin: int, end: int
) -> list[list[Answer]]:
    """The answers to each of a few examples."""
    total = len(inference.examples)
    ticker = Ticker(inference.world.is_main)
    some, cue = inference.examples[begin:end], inference.cue
    try:
        with inference.world.phase("answer"):
            given = answer(how, blocks, inference.chat, some, cue, lambda phase: ticker.at(phase, begin, total))
    except GenerationInterrupted:
        raise StopRequested(
            f"stopped on request: {begin} of {total} prompts are answered; the same command goes on"
        ) from None
    return [given[i : i + how.samples] for i in range(0, len(given), how.samples)]


def _keep(inference: Inference, scorer: Scorer, journal: Journal, begin: int, answers: list[list[Answer]]) -> None:
    if not inference.world.is_main:
        return
    for number, group in enumerate(answers, begin):
        example, gold_texts = inference.examples[number], inference.gold_texts[number]
        journal.append(predictions_of(number, example, gold_texts, group, inference.chat, scorer))


def _check_references(inference: Inference, scorer: Scorer) -> None:
    """Whether every row has something to be scored against. Raises UserError."""
    missing = [example.id for example, gold in zip(inference.examples, inference.gold_texts, strict=True) if not gold]
    if scorer.names and missing:
        raise UserError(
            f"--data: {len(missing)} of {len(inference.examples)} rows have no reference to score against (the first: "
            f'{missing[0]}); name its column with --reference, leave these rows out, or score none with --metrics ""'
        )


def _identity(inference: Inference, how: AnswerSettings, scorer: Scorer) -> dict[str, Any]:
    """What decides the answers and their scores: a journal continues only when all of it is the same."""
    from ssgen_ds.inference.model_source import fingerprint

    where = asdict(replace(inference.settings, batch="auto", deepspeed=None))  # they only change the cost
    del where["trust_remote_code"]  # without it the model would not have loaded
    where["reference"] = where.pop("reference_column")  # as the journals of earlier versions call it
    return {
        "where": where,
        "how": asdict(how),
        "metrics": scorer.names,
        "model": fingerprint(inference.model_source),
        "tokenizer": inference.chat.fingerprint(),
        "prompts": [len(inference.examples), inference.prompts_fingerprint],
        "cue": inference.cue if how.correct else None,
    }


def _finish(
    inference: Inference,
    how: AnswerSettings,
    scorer: Scorer,
    journal: Journal,
    out: Path,
    identity: str,
    seconds: float,
) -> None:
    journal.check_owner()
    predictions = journal.rows()
    file = predictions_file(out)
    result = {
        "kind": "evaluation",
        "model": inference.settings.model,
        "data": inference.settings.data,
        "step": None,  # only evaluations made by training have one
        "model_step": step_of_model(inference.settings.model, inference.model_source),
        "num_examples": len(inference.examples),
        "settings": all_settings(inference, how),
        **summarize(predictions, scorer.names),
        "predictions": file.name,
        "identity": identity,
        "seconds": round(seconds, 3),
    }
    write_lines(file, predictions)
    write_json(out, result)
    journal.close_for_good()
    from ssgen_ds.evaluate.table import print_evaluation

    print_evaluation(result, out)

"""`ssgen evaluate`: answer the prompts of a file, score the answers, say how sure the scores are. Resumable.

F.json has the scores, F.predictions.jsonl every answer with its own. Answers are kept as they come: the same command
goes on where an earlier one was stopped or killed, on any number of ranks.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import GenerationInterrupted, StopRequested, UserError
from ssgen_ds.evaluate.answers import Answer, AnswerSettings, answer
from ssgen_ds.evaluate.journal import Journal, write_json
from ssgen_ds.evaluate.scorers import Scorer
from ssgen_ds.evaluate.summary import Prediction, summarize
from ssgen_ds.generate import check_out, write_lines
from ssgen_ds.inference import Inference, InferenceSettings, Ticker, open_inference
from ssgen_ds.selfgen.engine_sampler import EngineSampler

if TYPE_CHECKING:
    from ssgen_ds.distributed import World

CHUNK = 2  # batches answered between two writes


def evaluate(where: InferenceSettings, how: AnswerSettings, metrics: list[str], out: Path | None) -> None:
    """Join the ranks and evaluate; see `evaluate_in`."""
    from ssgen_ds.distributed import process_group
    from ssgen_ds.signals import stop_on_signals

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
    scorer = world.together(lambda: Scorer(metrics))
    inference = open_inference(where, world)
    file = world.together(lambda: _out(out, inference))
    world.together(lambda: _check(inference, how, scorer))
    began = time.perf_counter()
    with Journal(file, _identity(inference, how, scorer), world, group=how.samples) as journal:
        _answer_the_rest(inference, how, scorer, journal)
        seconds = time.perf_counter() - began
        world.together(lambda: _finish(inference, how, scorer, journal, file, seconds) if world.is_main else None)
    inference.say_what_was_cut()


def _answer_the_rest(inference: Inference, how: AnswerSettings, scorer: Scorer, journal: Journal) -> None:
    world, examples = inference.world, inference.examples
    done = journal.num_rows // how.samples
    if done == len(examples):
        return
    sampler = inference.load()
    size = max(1, CHUNK * sampler.limit.rows * world.size // how.samples)
    with sampler.ready():  # parameters that are gathered stay so between the chunks
        for begin in range(done, len(examples), size):
            end = min(begin + size, len(examples))
            answers = _answer_some(inference, how, sampler, begin, end)
            world.together(lambda begin=begin, answers=answers: _score(inference, scorer, journal, begin, answers))


def _answer_some(
    inference: Inference, how: AnswerSettings, sampler: EngineSampler, begin: int, end: int
) -> list[list[Answer]]:
    """The answers to each of a few examples."""
    total = len(inference.examples)
    ticker = Ticker(inference.world.is_main)
    some, cue = inference.examples[begin:end], inference.cue
    try:
        given = answer(
            how, sampler, inference.chat, some, cue, inference.vocab_size, lambda phase: ticker.at(phase, begin, total)
        )
    except GenerationInterrupted:
        raise StopRequested(
            f"stopped on request: {begin} of {total} prompts are answered; the same command goes on"
        ) from None
    return [given[i : i + how.samples] for i in range(0, len(given), how.samples)]


def _score(inference: Inference, scorer: Scorer, journal: Journal, begin: int, answers: list[list[Answer]]) -> None:
    if not inference.world.is_main:
        return
    for number, group in enumerate(answers, begin):
        example, references = inference.examples[number], inference.references[number]
        journal.append(predictions_of(number, example, references, group, inference.chat, scorer))


def predictions_of(
    index: int,
    example: Example,
    references: tuple[str, ...],
    answers: list[Answer],
    chat: ChatFormat,
    scorer: Scorer,
) -> list[Prediction]:
    """The answers to one example as lines of the predictions file."""
    rows = []
    for sample, given in enumerate(answers):
        turns = [chat.decode(ids) for ids in given.turns]
        scores = scorer(turns[-1], references) if references else {}
        row: Prediction = {
            "index": index,
            "id": example.id,
            "sample": sample,
            "prompt": chat.decode(example.prompt_ids),
            "references": list(references),
            "prediction": turns[-1],
            "turns": turns,
            "stopped": given.stopped[-1],
            "num_tokens": given.num_tokens[-1],
            "reference_tokens": len(example.response_ids) if references else 0,
            "scores": scores,
        }
        # A first answer that was not corrected is its own last one.
        row["first_scores"] = scorer(turns[0], references) if references and turns[0] != turns[-1] else scores
        rows.append(row)
    return rows


def _out(out: Path | None, inference: Inference) -> Path:
    if out is None:
        run_dir = Path(inference.settings.model)
        if not (run_dir / "recipe.yaml").is_file():
            raise UserError("--out: name the JSON file to write (a run folder keeps its own in evaluations/)")
        stem = re.sub(r"[^\w.-]+", "-", Path(inference.settings.data).with_suffix("").as_posix()).strip("-.")
        out = run_dir / "evaluations" / f"{stem[-60:]}.json"
        if inference.world.is_main:
            out.parent.mkdir(exist_ok=True)
        return out
    check_out(out)
    if out.suffix != ".json":
        raise UserError(
            f"--out: {out} must end in .json; the predictions go into {out.stem}.predictions.jsonl beside it"
        )
    return out


def _check(inference: Inference, how: AnswerSettings, scorer: Scorer) -> None:
    inference.check_lengths(how.max_new_tokens, how.correct)
    if how.samples > 1 and how.temperature == 0:
        raise UserError("--samples: all greedy answers to a prompt are the same; set --temperature, or --samples 1")
    missing = [example.id for example, gold in zip(inference.examples, inference.references, strict=True) if not gold]
    if scorer.names and missing:
        raise UserError(
            f"--data: {len(missing)} of {len(inference.examples)} rows have no reference to score against (the first: "
            f'{missing[0]}); name its column with --reference, leave these rows out, or score none with --metrics ""'
        )


def _identity(inference: Inference, how: AnswerSettings, scorer: Scorer) -> dict[str, Any]:
    """What decides the answers and their scores: answers of another model or other settings are not mixed in."""
    from ssgen_ds.references import fingerprint

    where = replace(inference.settings, batch="auto", deepspeed=None)  # they change the cost only
    return {
        "where": asdict(where),
        "how": asdict(how),
        "metrics": scorer.names,
        "model": fingerprint(inference.reference),
        "tokenizer": inference.chat.fingerprint(),
        "prompts": [len(inference.examples), inference.prompts_fingerprint],
    }


def _finish(
    inference: Inference, how: AnswerSettings, scorer: Scorer, journal: Journal, out: Path, seconds: float
) -> None:
    journal.check_owner()
    predictions = journal.rows()
    file = out.with_name(f"{out.stem}.predictions.jsonl")
    result = {
        "kind": "evaluation",
        "model": inference.settings.model,
        "data": inference.settings.data,
        "step": None,
        "num_examples": len(inference.examples),
        "settings": {**asdict(how), "prompt": inference.settings.prompt, "limit": inference.settings.limit},
        **summarize(predictions, scorer.names),
        "predictions": file.name,
        "seconds": round(seconds, 3),
    }
    write_lines(file, predictions)
    write_json(out, result)
    journal.close_for_good()
    from ssgen_ds.evaluate.table import print_evaluation

    print_evaluation(result, out)

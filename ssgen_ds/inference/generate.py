"""`ssgen generate`: answer every prompt of a file with the one sampler, with optional self-correction turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssgen_ds.errors import Problems
from ssgen_ds.inference.answers import Answer, AnswerSettings, answer
from ssgen_ds.inference.session import Inference, InferenceSettings, Ticker, check_new, open_inference
from ssgen_ds.run.files import write_lines


def generate(where: InferenceSettings, how: AnswerSettings, out: Path) -> None:
    """Write one JSON line for each prompt: id, prompt, reference, prediction, turns, stopped, num_tokens.

    Every input is checked before any weight is loaded. Answers do not depend on the number of processes.
    """
    from ssgen_ds.distributed.process_group import process_group

    with process_group() as world:
        problems = Problems()
        if world.is_main:
            problems.ask(lambda: check_new(out))
        inference = open_inference(where, world, problems)
        world.together(lambda: inference.check_lengths(how.max_new_tokens, how.correct))
        sampler = inference.load()
        chat, examples = inference.chat, inference.examples
        with world.phase("answer"):
            answers = answer(how, inference.blocks(sampler), chat, examples, inference.cue, Ticker(world.is_main).at)
        rows = [_row(inference, i, given) for i, given in enumerate(answers)]
        world.together(lambda: write_lines(out, rows) if world.is_main else None)
        if world.is_main:
            print(f"{out}: {len(rows)} answers, {sum(row['stopped'] for row in rows)} ended by themselves")
        inference.say_what_was_cut()


def _row(inference: Inference, number: int, given: Answer) -> dict[str, Any]:
    example, chat = inference.examples[number], inference.chat
    turns = [chat.decode(ids) for ids in given.turns]
    return {
        "id": example.id,
        "prompt": chat.decode(example.prompt_ids),
        "reference": example.gold_text,
        "prediction": turns[-1],
        "turns": turns,
        "stopped": given.stopped[-1],
        "num_tokens": given.num_tokens[-1],
    }

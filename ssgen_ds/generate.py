"""`ssgen generate`: answers to every prompt of a file with the one sampler, and optional self-correction turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.answers import Answer, AnswerSettings, answer
from ssgen_ds.files import write_whole
from ssgen_ds.inference import Inference, InferenceSettings, Ticker, open_inference


def generate(where: InferenceSettings, how: AnswerSettings, out: Path) -> None:
    """Write one JSON line a prompt: id, prompt, reference, prediction, turns, stopped, num_tokens.

    Every input is checked before any weight is loaded. Answers do not depend on the number of processes.
    """
    from ssgen_ds.distributed import process_group

    with process_group() as world:
        world.together(lambda: check_out(out))
        inference = open_inference(where, world)
        world.together(lambda: inference.check_lengths(how.max_new_tokens, how.correct))
        sampler = inference.load()
        chat, examples = inference.chat, inference.examples
        answers = answer(how, sampler, chat, examples, inference.cue, inference.vocab_size, Ticker(world.is_main).at)
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
        "reference": example.reference,
        "prediction": turns[-1],
        "turns": turns,
        "stopped": given.stopped[-1],
        "num_tokens": given.num_tokens[-1],
    }


def check_out(out: Path) -> None:
    """Whether a file can be written there. Raises UserError."""
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file in it")


def write_lines(out: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, all or nothing: a reader never finds half a file."""
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

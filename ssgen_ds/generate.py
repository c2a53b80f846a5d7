"""`ssgen generate`: answers to every prompt of a file with the one sampler, and optional self-correction turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.config import DataConfig, RacConfig, SourceConfig
from ssgen_ds.data.paths import resolve_path
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError
from ssgen_ds.selfgen.engine_sampler import BatchLimit, EngineSampler
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.noise import Stream, sequence_key
from ssgen_ds.selfgen.rac import content_ids, free_request
from ssgen_ds.selfgen.requests import Request


@dataclass(frozen=True)
class GenerateSettings:
    model: str
    data: str
    out: Path
    correct: int = 0
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 8
    limit: int | None = None
    prompt: str | None = None


class Ticker:
    """A line on standard error now and then: how far a long generation is."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._last = time.monotonic()

    def at(self, phase: str) -> Callable[[int, int], None]:
        """The callback that a sampler calls with sequences done and sequences in all."""

        def tick(done: int, total: int) -> None:
            if self._enabled and time.monotonic() - self._last >= self.SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                print(f"{phase} {done}/{total}", file=sys.stderr, flush=True)

        return tick


def generate(settings: GenerateSettings) -> None:
    """Write one JSON line a prompt: id, prompt, reference, prediction, turns, stopped, num_tokens.

    Every input is checked before any weight is loaded. Answers do not depend on the number of processes.
    """
    from ssgen_ds.build import generation_stops
    from ssgen_ds.data.loader import read_prompts
    from ssgen_ds.distributed import process_group
    from ssgen_ds.modeling.load import load_config, load_tokenizer
    from ssgen_ds.references import load_reference, resolve_reference

    with process_group() as world:
        world.together(lambda: _check_out(settings.out))
        reference = world.together(lambda: resolve_reference(settings.model))
        data = _data_config(settings, reference.recipe.data if reference.recipe else None)
        world.together(lambda: resolve_path(settings.data, "--data"))
        tokenizer = world.main_first(lambda: load_tokenizer(reference.model))
        config = world.together(lambda: load_config(reference.model))
        chat = world.together(lambda: ChatFormat(tokenizer, data, generation_stops(config)))
        examples = world.together(lambda: read_prompts(data, chat))[: settings.limit]
        cue = (reference.recipe.method.rac if reference.recipe else RacConfig()).correction_cue
        world.together(lambda: _check_lengths(settings, chat, examples, cue, config.get_text_config()))
        model = world.together(lambda: load_reference(reference, world.device))
        sampler = EngineSampler(model, world, BatchLimit(settings.batch))
        rows = answer(settings, sampler, chat, examples, cue, config.get_text_config().vocab_size)
        world.together(lambda: _write(settings.out, rows) if world.is_main else None)
        if world.is_main:
            _say_what_was_written(settings.out, rows, examples, data)


def answer(
    settings: GenerateSettings,
    sampler: EngineSampler,
    chat: ChatFormat,
    examples: list[Example],
    cue: str,
    vocab_size: int,
) -> list[dict[str, Any]]:
    """Answer, then correct `settings.correct` times; each turn shows the model its latest answer, as in training."""
    stop_ids = frozenset(chat.stop_ids)
    banned = tuple(chat.banned_ids(vocab_size, keep=stop_ids))
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, banned)
    cue_ids = chat.correction_ids(cue)
    prompts = [example.prompt_ids for example in examples]
    turns = []
    ticker = Ticker(sampler.world.is_main)
    for turn in range(settings.correct + 1):
        requests: list[Request] = [
            free_request(
                prompt_ids,
                settings.max_new_tokens,
                sequence_key(settings.seed, Stream.EVALUATION, example.id, turn),
                stop_ids,
            )
            for example, prompt_ids in zip(examples, prompts, strict=True)
        ]
        results, _, _ = sampler.sample(requests, sampling, 1, ticker.at("correcting" if turn else "answering"))
        turns.append(results)
        prompts = [
            example.prompt_ids + content_ids(result) + cue_ids
            for example, result in zip(examples, results, strict=True)
        ]
    return [
        {
            "id": example.id,
            "prompt": chat.decode(example.prompt_ids),
            "reference": example.reference,
            "prediction": chat.decode(content_ids(turns[-1][i])),
            "turns": [chat.decode(content_ids(turn[i])) for turn in turns],
            "stopped": turns[-1][i].stopped,
            "num_tokens": len(turns[-1][i].tokens),
        }
        for i, example in enumerate(examples)
    ]


def _data_config(settings: GenerateSettings, trained: DataConfig | None) -> DataConfig:
    """The run's own data settings, pointed at the file to answer; those of its source, too, where it had only one."""
    own = trained.train[0] if trained is not None and len(trained.train) == 1 else SourceConfig(path=settings.data)
    columns, prompt = own.columns, own.prompt
    if settings.prompt is not None:
        columns = {name: column for name, column in (own.columns or {}).items() if name not in ("prompt", "messages")}
        prompt = settings.prompt
    source = SourceConfig(path=settings.data, columns=columns, prompt=prompt)
    # Every prompt is answered: none is left out because it, or its reference, would be too long to train on.
    update = {"train": [source], "eval": [], "over_length": "truncate", "on_bad_row": "error", "loss_on": "last"}
    return (trained or DataConfig(train=[source])).model_copy(update=update)


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file in it")


def _check_lengths(
    settings: GenerateSettings, chat: ChatFormat, examples: list[Example], cue: str, config: Any
) -> None:
    """Whether the longest prompt and its answers fit the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)  # a family trait: some have no limit
    prompt = max(len(example.prompt_ids) for example in examples)
    turns, fixed = (1, prompt) if settings.correct == 0 else (2, prompt + len(chat.correction_ids(cue)))
    if limit is not None and fixed + turns * settings.max_new_tokens > limit:
        what = "--data: the longest prompt" if turns == 1 else "--data: the longest prompt with the correction cue"
        fits = (limit - fixed) // turns
        advice = f"--max-new-tokens can be at most {fits}" if fits > 0 else "it leaves no room for an answer"
        raise UserError(f"{what} has {fixed} tokens and the model {limit} positions: {advice}")


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    """All or nothing: a reader never finds half a file."""
    partial = out.with_name(f".partial-{out.name}")
    try:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _say_what_was_written(out: Path, rows: list[dict[str, Any]], examples: list[Example], data: DataConfig) -> None:
    print(f"{out}: {len(rows)} answers, {sum(row['stopped'] for row in rows)} ended by themselves")
    if cut := sum(example.prompt_truncated for example in examples):
        print(f"{cut} prompts were cut to {data.max_prompt_tokens} tokens (data.max_prompt_tokens)")

"""`ssgen generate`: answers to every prompt of a file with the one sampler, and optional self-correction turns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds.config import DataConfig, RacConfig, SourceConfig
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError
from ssgen_ds.selfgen.engine_sampler import EngineSampler
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.fixed_point import Request
from ssgen_ds.selfgen.noise import Stream, sequence_key
from ssgen_ds.selfgen.rac import content_ids, free_request


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


def generate(settings: GenerateSettings) -> None:
    """Write one JSON line a prompt: id, prompt, prediction, corrections, stopped, num_tokens."""
    from ssgen_ds.data.loader import read_prompts
    from ssgen_ds.distributed import process_group
    from ssgen_ds.references import load_reference, resolve_reference

    with process_group() as world:
        world.together(lambda: _check_out(settings.out))
        reference = world.together(lambda: resolve_reference(settings.model))
        model, tokenizer = world.main_first(lambda: load_reference(reference, world.device))
        data = _data_config(settings, reference.recipe.data if reference.recipe else None)
        stops = model.config.get_text_config().eos_token_id
        chat = world.together(lambda: ChatFormat(tokenizer, data, [stops] if isinstance(stops, int) else stops or []))
        examples = world.together(lambda: read_prompts(data, chat))[: settings.limit]
        rac = reference.recipe.method.rac if reference.recipe else RacConfig()
        sampler = EngineSampler(model, world, sharded=False, batch=settings.batch)
        rows = answer(settings, sampler, chat, examples, rac.correction_cue, _vocab_size(model))
        if world.is_main:
            settings.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            print(f"{settings.out}: {len(rows)} answers")
        world.barrier()


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
        results, _, _ = sampler.sample(requests, sampling, block=1)
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
    """The run's own data settings, pointed at the file to answer."""
    source = [SourceConfig(path=settings.data)]
    update: dict[str, Any] = {"train": source, "eval": [], "eval_fraction": 0.0, "streaming": False}
    if settings.prompt is not None:
        update["prompt"] = settings.prompt
    return (trained or DataConfig(train=source)).model_copy(update=update)


def _vocab_size(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")

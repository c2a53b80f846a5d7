"""A model reference and a file of prompts, checked before any weight loads; then the model, whole or partitioned.

What `generate`, `evaluate` and `gap` share:

    with process_group(stop=stop) as world:
        inference = open_inference(InferenceSettings(model, data), world)
        sampler = inference.load()
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssgen_ds.config import DataConfig, RacConfig, SelfgenConfig, SourceConfig
from ssgen_ds.data.paths import resolve_path
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError

if TYPE_CHECKING:
    from ssgen_ds.distributed import World
    from ssgen_ds.references import Reference
    from ssgen_ds.selfgen.engine_sampler import EngineSampler

References = tuple[str, ...]


@dataclass(frozen=True)
class InferenceSettings:
    """Which model answers what. `batch`: sequences decoded together on a rank; auto: as many as memory allows.

    `deepspeed`: a DeepSpeed file; with ZeRO stage 3 the model is partitioned over the ranks, else each holds it whole.
    """

    model: str
    data: str
    prompt: str | None = None
    limit: int | None = None
    batch: int | str = "auto"
    deepspeed: str | None = None
    reference: str | None = None  # column of the gold answers
    max_prompt_tokens: int | None = None  # where prompts are cut; None: as the run's own, or by default


@dataclass
class Inference:
    """Checked inputs. `references` has the gold answers of each example; () where a row has none."""

    settings: InferenceSettings
    world: World
    reference: Reference
    ds_config: dict[str, Any]
    data: DataConfig
    chat: ChatFormat
    config: Any  # of the model's text part
    examples: list[Example]
    references: list[References]

    @property
    def cue(self) -> str:
        """The correction cue that the model was trained with, or the default one."""
        recipe = self.reference.recipe
        return (recipe.method.rac if recipe else RacConfig()).correction_cue

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def prompts_fingerprint(self) -> str:
        """Hex over ids, tokens and references, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for example, references in zip(self.examples, self.references, strict=True):
            digest.update(json.dumps([example.id, example.prompt_ids, references]).encode())
        return digest.hexdigest()

    def check_lengths(self, max_new_tokens: int, correct: int) -> None:
        """Whether the longest prompt and its answers fit the model's positions. Raises UserError."""
        limit = getattr(self.config, "max_position_embeddings", None)  # a family trait: some have no limit
        prompt = max(len(example.prompt_ids) for example in self.examples)
        turns, fixed = (1, prompt) if correct == 0 else (2, prompt + len(self.chat.correction_ids(self.cue)))
        if limit is not None and fixed + turns * max_new_tokens > limit:
            what = "--data: the longest prompt" if turns == 1 else "--data: the longest prompt with the correction cue"
            fits = (limit - fixed) // turns
            advice = f"--max-new-tokens can be at most {fits}" if fits > 0 else "it leaves no room for an answer"
            raise UserError(f"{what} has {fixed} tokens and the model {limit} positions: {advice}")

    def load(self) -> EngineSampler:
        """The model in eval mode behind the sampler, on all ranks together."""
        from ssgen_ds.references import load_reference
        from ssgen_ds.selfgen.strategy import inference_sampler

        world, recipe = self.world, self.reference.recipe
        model = world.together(lambda: load_reference(self.reference, world.device, self.ds_config))
        selfgen = SelfgenConfig(batch=self.settings.batch)
        is_quantized = recipe is not None and recipe.quantization.kind != "none"
        return inference_sampler(model, selfgen, is_quantized, world)

    def say_what_was_cut(self) -> None:
        """On standard output of rank 0: how many prompts were shortened."""
        cut = sum(example.prompt_truncated for example in self.examples)
        if cut and self.world.is_main:
            print(f"{cut} prompts were cut to {self.data.max_prompt_tokens} tokens (data.max_prompt_tokens)")


def open_inference(settings: InferenceSettings, world: World) -> Inference:
    """Find the model, read tokenizer and prompts. Raises UserError on all ranks together, before weights load."""
    from ssgen_ds.build import generation_stops
    from ssgen_ds.data.loader import read_questions
    from ssgen_ds.ds_config import inference_config
    from ssgen_ds.modeling.load import load_config, load_tokenizer
    from ssgen_ds.references import resolve_reference

    reference = world.together(lambda: resolve_reference(settings.model))
    ds_config = world.together(lambda: inference_config(settings.deepspeed, world.size))
    data = data_config(settings, reference.recipe.data if reference.recipe else None)
    world.together(lambda: resolve_path(settings.data, "--data"))
    tokenizer = world.main_first(lambda: load_tokenizer(reference.model))
    config = world.together(lambda: load_config(reference.model))
    chat = world.together(lambda: ChatFormat(tokenizer, data, generation_stops(config)))
    examples, references = world.together(lambda: read_questions(data, chat))
    examples, references = examples[: settings.limit], references[: settings.limit]
    return Inference(settings, world, reference, ds_config, data, chat, config.get_text_config(), examples, references)


def data_config(settings: InferenceSettings, trained: DataConfig | None) -> DataConfig:
    """The run's own data settings, pointed at the file to answer; those of its source, too, where it had only one."""
    own = trained.train[0] if trained is not None and len(trained.train) == 1 else SourceConfig(path=settings.data)
    columns, prompt = own.columns, own.prompt
    if settings.prompt is not None:
        columns = {name: column for name, column in (own.columns or {}).items() if name not in ("prompt", "messages")}
        prompt = settings.prompt
    if settings.reference is not None:
        columns = {**(columns or {}), "completion": settings.reference}
    source = SourceConfig(path=settings.data, columns=columns, prompt=prompt)
    # Every prompt is answered: none is left out because it, or its reference, would be too long to train on.
    update: dict[str, Any] = {
        "train": [source],
        "eval": [],
        "over_length": "truncate",
        "on_bad_row": "error",
        "loss_on": "last",
    }
    if settings.max_prompt_tokens is not None:
        update["max_prompt_tokens"] = settings.max_prompt_tokens
    return (trained or DataConfig(train=[source])).model_copy(update=update)


class Ticker:
    """A line on standard error now and then: how far a long generation is."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._last = time.monotonic()

    def at(self, phase: str, before: int = 0, in_all: int | None = None) -> Callable[[int, int], None]:
        """The callback that a sampler calls with sequences done and sequences in all.

        `before` were done in earlier calls, of `in_all`.
        """

        def tick(done: int, total: int) -> None:
            if self._enabled and time.monotonic() - self._last >= self.SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                print(f"{phase} {before + done}/{in_all or total}", file=sys.stderr, flush=True)

        return tick

"""A model and a file of prompts, checked before any weight loads; then the model, whole or partitioned.

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.paths import resolve_path
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import Problems, UserError
from ssgen_ds.modeling.positions import positions
from ssgen_ds.recipe.schema import DataConfig, RacConfig, SelfgenConfig, SourceConfig
from ssgen_ds.run.files import check_writable

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World
    from ssgen_ds.inference.model_source import ModelSource
    from ssgen_ds.modeling.load import OpenedModel
    from ssgen_ds.sampler.block import BlockChooser
    from ssgen_ds.sampler.engine import EngineSampler
    from ssgen_ds.sampler.requests import OnDone

GoldTexts = tuple[str, ...]


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
    reference_column: str | None = None  # column of the gold answers
    max_prompt_tokens: int | None = None  # where prompts are cut; None: as the run's own, or by default
    trust_remote_code: bool = False  # let code that comes with the model run, whatever its folder says


@dataclass
class Inference:
    """Checked inputs. `gold_texts` has the gold answers of each example; () where a row has none."""

    settings: InferenceSettings
    world: World
    model_source: ModelSource
    ds_config: dict[str, Any]
    data: DataConfig
    chat: ChatFormat
    config: Any  # of the model's text part
    examples: list[Example]
    gold_texts: list[GoldTexts]

    @property
    def cue(self) -> str:
        """The correction cue that the model was trained with, or the default one."""
        recipe, notes = self.model_source.recipe, self.model_source.notes
        if recipe is None and notes is not None and notes.correction_cue is not None:
            return notes.correction_cue
        return (recipe.method.rac if recipe else RacConfig()).correction_cue

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def prompts_fingerprint(self) -> str:
        """Hex over ids, tokens and gold answers, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for example, gold_texts in zip(self.examples, self.gold_texts, strict=True):
            digest.update(json.dumps([example.id, example.prompt_ids, gold_texts]).encode())
        return digest.hexdigest()

    def check_lengths(self, max_new_tokens: int, correct: int) -> None:
        """Whether the longest prompt and its answers fit the model's positions, and the cue its tokens.

        Raises UserError.
        """
        if correct and (what := self.chat.beyond_embedding(self.chat.correction_ids(self.cue))):
            raise UserError(f"--correct: the correction cue {self.cue!r}: {what}")
        limit, there = positions(self.config)
        prompt = max(len(example.prompt_ids) for example in self.examples)
        turns, fixed = (1, prompt) if correct == 0 else (2, prompt + len(self.chat.correction_ids(self.cue)))
        if limit is not None and fixed + turns * max_new_tokens > limit:
            what = "--data: the longest prompt" if turns == 1 else "--data: the longest prompt with the correction cue"
            fits = (limit - fixed) // turns
            advice = f"--max-new-tokens can be at most {fits}" if fits > 0 else "it leaves no room for an answer"
            raise UserError(f"{what} has {fixed} tokens and the model {there}: {advice}")

    def check_responses(self) -> None:
        """Whether every prompt with its response fits the model's positions. Raises UserError."""
        limit, there = positions(self.config)
        longest = max(len(example.prompt_ids) + len(example.response_ids) for example in self.examples)
        if limit is not None and longest > limit:
            raise UserError(
                f"--data: the longest prompt with its response has {longest} tokens and the model {there}: leave "
                "longer rows out, or train with a lower data.max_prompt_tokens"
            )

    def load(self) -> EngineSampler:
        """The model in eval mode behind the sampler, on all ranks together."""
        from ssgen_ds.inference.model_source import load_model_source
        from ssgen_ds.sampler.build import inference_sampler

        world, quantization = self.world, self.model_source.quantization
        model = world.together(
            lambda: load_model_source(self.model_source, world.device, self.ds_config, world.control)
        )
        selfgen = SelfgenConfig(batch=self.settings.batch)
        is_quantized = quantization is not None and quantization.kind != "none"
        return inference_sampler(model, selfgen, is_quantized, world)

    def blocks(self, sampler: EngineSampler) -> BlockChooser:
        """Chooses how many tokens a call tries, by what calls cost on this machine."""
        from ssgen_ds.sampler.block import BlockChooser

        return BlockChooser("auto", sampler, self.vocab_size)

    def say_what_was_cut(self) -> None:
        """On standard output of rank 0: how many prompts were shortened."""
        cut = sum(example.prompt_truncated for example in self.examples)
        if cut and self.world.is_main:
            print(f"{cut} prompts were cut to {self.data.max_prompt_tokens} tokens (data.max_prompt_tokens)")


def open_inference(settings: InferenceSettings, world: World, problems: Problems | None = None) -> Inference:
    """Find the model, read tokenizer and prompts; before weights load.

    Args:
        problems: what the caller has found; it is told together with what is found here.

    Raises:
        UserError: on all ranks together, with every problem.
    """
    from ssgen_ds.data.datasets import read_questions
    from ssgen_ds.inference.model_source import resolve_model_source
    from ssgen_ds.recipe.deepspeed import inference_config

    problems = Problems() if problems is None else problems
    model_source = problems.ask(lambda: resolve_model_source(settings.model, settings.trust_remote_code))
    ds_config = problems.ask(lambda: inference_config(settings.deepspeed, world.size))
    problems.ask(lambda: resolve_path(settings.data, "--data"))
    data = data_config(settings, None if model_source is None else trained_data(model_source))
    opened = world.in_turn(lambda: _open_model(model_source, data, problems))
    asked = None if opened is None else problems.ask(lambda: read_questions(data, opened.chat))
    world.together(problems.refuse)
    assert model_source is not None and ds_config is not None and opened is not None and asked is not None
    examples, gold_texts = asked[0][: settings.limit], asked[1][: settings.limit]
    return Inference(
        settings, world, model_source, ds_config, data, opened.chat, opened.text_config, examples, gold_texts
    )


def _open_model(model_source: ModelSource | None, data: DataConfig, problems: Problems) -> OpenedModel | None:
    from ssgen_ds.modeling.load import open_model

    return None if model_source is None else problems.ask(lambda: open_model(model_source.model, data))


def trained_data(model_source: ModelSource) -> DataConfig | None:
    """How the model's training data was read: by its run, or as far as its folder says so; None where nothing does."""
    if model_source.recipe is not None:
        return model_source.recipe.data
    if model_source.notes is None:
        return None
    known = {
        name: getattr(model_source.notes, name) for name in ("system", "max_prompt_tokens", "chat_template_kwargs")
    }
    return DataConfig.model_validate({"train": [], **{k: value for k, value in known.items() if value is not None}})


def data_config(settings: InferenceSettings, trained: DataConfig | None) -> DataConfig:
    """The run's own data settings, pointed at the file to answer; those of its source, too, where it had only one."""
    own = trained.train[0] if trained is not None and len(trained.train) == 1 else SourceConfig(path=settings.data)
    columns, prompt = own.columns, own.prompt
    if settings.prompt is not None:
        columns = {name: column for name, column in (own.columns or {}).items() if name not in ("prompt", "messages")}
        prompt = settings.prompt
    if settings.reference_column is not None:
        columns = {**(columns or {}), "completion": settings.reference_column}
    source = SourceConfig(path=settings.data, columns=columns, prompt=prompt)
    # Every prompt is answered: none is left out because it, or its response, would be too long to train on.
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

    def at(self, phase: str, before: int = 0, in_all: int | None = None) -> OnDone:
        """The callback that a sampler calls with sequences done and sequences in all.

        `before` were done in earlier calls, of `in_all`.
        """

        def show(done: int, total: int) -> None:
            if self._enabled and time.monotonic() - self._last >= self.SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                print(f"{phase} {before + done}/{in_all or total}", file=sys.stderr, flush=True)

        return show


def check_out(out: Path) -> None:
    """Whether a file can be written there, found before the model answers for hours. Raises UserError."""
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file in it")
    if out.exists() and not out.is_file():
        raise UserError(f"--out: {out} is a device or a pipe; name a file")
    try:
        check_writable(out.parent)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); name a file elsewhere") from None


def check_new(out: Path) -> None:
    """`check_out`, and refuse to replace a file: answers do not say how they were made. Raises UserError."""
    check_out(out)
    if out.is_file() and out.stat().st_size:
        raise UserError(f"--out: {out} is there already and would be replaced; name another file, or delete it")


def check_samples(samples: int, temperature: float) -> None:
    """Whether several answers to a prompt can differ. Raises UserError."""
    if samples > 1 and temperature == 0:
        raise UserError("--samples: all greedy answers to a prompt are the same; set --temperature, or --samples 1")

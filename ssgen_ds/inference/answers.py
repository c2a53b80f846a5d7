"""Answers to prompts with the one sampler, and self-correction turns, in which the model sees its answer and the cue.

An answer does not depend on the number of processes, the batch or the other prompts: its noise has its own key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.sampler.block import (
    GREEDY_ANSWERS,
    GREEDY_CORRECTIONS,
    SAMPLED_ANSWERS,
    SAMPLED_CORRECTIONS,
    BlockChooser,
    LookupRates,
)
from ssgen_ds.sampler.filters import Sampling, SamplingSettings
from ssgen_ds.sampler.free import content_ids, free_request
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.sampler.requests import OnDoneOf


@dataclass(frozen=True)
class AnswerSettings(SamplingSettings):
    """How prompts are answered. `correct`: at most so many more turns. `samples`: answers to each prompt."""

    max_new_tokens: int = 256
    temperature: float = field(default=0.0, kw_only=True)
    seed: int = 0
    correct: int = 0
    samples: int = 1


@dataclass
class Answer:
    """All turns of one answer: their tokens without the stop id, and whether a stop id ended them."""

    turns: list[list[int]] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # sampled, the stop id included

    @property
    def goes_on(self) -> bool:
        """Whether another correction could change something: not after a turn that repeats the one before."""
        return len(self.turns) < 2 or self.turns[-1] != self.turns[-2]


def answer(
    settings: AnswerSettings,
    blocks: BlockChooser,
    chat: ChatFormat,
    examples: list[Example],
    cue: str,
    on_done_of: OnDoneOf = lambda phase: lambda done, total: None,
) -> list[Answer]:
    """Answer, then correct up to `settings.correct` times; each turn shows the model its latest answer, as in training.

    `settings.samples` answers for each example, one example's together. All ranks pass the same and get the same. What
    an answer may repeat (its prompt, the turns before it) is looked up: that changes the number of model calls, and in
    float32 nothing else.

    Args:
        blocks: chooses how many tokens are tried in one call; its sampler samples.
    """
    sampler = blocks.sampler
    stop_ids = frozenset(chat.stop_ids)
    sampling = Sampling.of(settings, chat.banned_ids(blocks.vocab_size, keep=stop_ids))
    cue_ids = chat.correction_ids(cue) if settings.correct else []
    everyone = [(example, sample, Answer()) for example in examples for sample in range(settings.samples)]
    with sampler.ready():
        for turn in range(settings.correct + 1):
            active = [item for item in everyone if item[2].goes_on]
            if not active:
                break
            requests = []
            for example, sample, given in active:
                shown = given.turns[-1] + cue_ids if given.turns else []
                key = answer_key(settings.seed, example.id, sample, turn)
                requests.append(free_request(example.prompt_ids + shown, settings.max_new_tokens, key, stop_ids))
            block = blocks.answering(requests, _rates(settings, turn))
            if block != 1:
                for (_, _, given), request in zip(active, requests, strict=True):
                    request.corpora = tuple(reversed(given.turns))
            results, _, _ = sampler.sample(requests, sampling, block, on_done_of("correcting" if turn else "answering"))
            for (_, _, given), result in zip(active, results, strict=True):
                given.turns.append(content_ids(result))
                given.stopped.append(result.stopped)
                given.num_tokens.append(len(result.tokens))
    return [given for _, _, given in everyone]


def _rates(settings: AnswerSettings, turn: int) -> LookupRates:
    if settings.temperature == 0:
        return GREEDY_CORRECTIONS if turn else GREEDY_ANSWERS
    return SAMPLED_CORRECTIONS if turn else SAMPLED_ANSWERS


def answer_key(seed: int, example_id: str, sample: int, turn: int) -> int:
    """The key of the noise of one turn of one answer."""
    name = example_id if sample == 0 else f"{example_id}\x1e{sample}"
    return sequence_key(seed, Stream.EVALUATION, name, turn)

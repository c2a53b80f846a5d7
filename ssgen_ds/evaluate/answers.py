"""Answers to prompts with the one sampler, and self-correction turns: the model is shown its answer and the cue.

Answers do not depend on the number of processes, the batch or what else is answered: their noise has a key of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.selfgen.engine_sampler import EngineSampler
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.noise import Stream, sequence_key
from ssgen_ds.selfgen.rac import content_ids, free_request

Tick = Callable[[str], Callable[[int, int], None]]  # a phase's name -> the sampler's progress callback


@dataclass(frozen=True)
class AnswerSettings:
    """How prompts are answered. `correct`: turns after the first answer, at most. `samples`: answers to each prompt."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    correct: int = 0
    samples: int = 1


@dataclass
class Answer:
    """All turns of one answer: their tokens without the stop id, whether a stop id ended them."""

    turns: list[list[int]] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # sampled, the stop id included

    @property
    def goes_on(self) -> bool:
        """Whether another correction could still change something: a turn that repeats the last one ends it."""
        return len(self.turns) < 2 or self.turns[-1] != self.turns[-2]


def answer(
    settings: AnswerSettings,
    sampler: EngineSampler,
    chat: ChatFormat,
    examples: list[Example],
    cue: str,
    vocab_size: int,
    tick: Tick = lambda phase: lambda done, total: None,
) -> list[Answer]:
    """Answer, then correct up to `settings.correct` times; each turn shows the model its latest answer, as in training.

    `settings.samples` answers for each example, one example's together. All ranks pass the same and get the same.
    """
    stop_ids = frozenset(chat.stop_ids)
    banned = tuple(chat.banned_ids(vocab_size, keep=stop_ids))
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, banned)
    cue_ids = chat.correction_ids(cue) if settings.correct else []
    everyone = [(example, sample, Answer()) for example in examples for sample in range(settings.samples)]
    for turn in range(settings.correct + 1):
        active = [item for item in everyone if item[2].goes_on]
        requests = []
        for example, sample, given in active:
            shown = given.turns[-1] + cue_ids if given.turns else []
            key = answer_key(settings.seed, example.id, sample, turn)
            requests.append(free_request(example.prompt_ids + shown, settings.max_new_tokens, key, stop_ids))
        if not requests:
            break
        results, _, _ = sampler.sample(requests, sampling, 1, tick("correcting" if turn else "answering"))
        for (_, _, given), result in zip(active, results, strict=True):
            given.turns.append(content_ids(result))
            given.stopped.append(result.stopped)
            given.num_tokens.append(len(result.tokens))
    return [given for _, _, given in everyone]


def answer_key(seed: int, example_id: str, sample: int, turn: int) -> int:
    """The key of the noise of one turn of one answer."""
    name = example_id if sample == 0 else f"{example_id}\x1e{sample}"
    return sequence_key(seed, Stream.EVALUATION, name, turn)

"""One trained model in numbers: answers, corrections, and the gap curve. All models meet the same prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.study.settings import RATES
from bench.study.tasks import CUE
from ssgen_ds.data.datasets import read_prompts
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.data.window import collate
from ssgen_ds.distributed.world import World
from ssgen_ds.metrics.text import exact_match
from ssgen_ds.recipe.schema import DataConfig, SourceConfig
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import content_ids, free_request
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.selfgen.bss import bss_request, context_sequence

ROWS = 100  # sequences at a time
SEED = 12345  # of the evaluation's noise: no run's seed
Contexts = dict[float, list[list[int]]]  # by mix rate, in the order of the examples


class Subject:
    """A trained model, the sampler on it and the held-out prompts."""

    def __init__(self, model_dir: Path, data_file: Path, max_answer: int, world: World) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        data = DataConfig(train=[SourceConfig(path=str(data_file))], max_response_tokens=max_answer)
        self.chat = ChatFormat(AutoTokenizer.from_pretrained(model_dir), data)
        self.examples: list[Example] = read_prompts(data, self.chat)
        self.sampler = EngineSampler(self.model, world, BatchLimit(ROWS))
        self.max_answer = max_answer
        self.stop_ids = frozenset(self.chat.stop_ids)
        self.vocab_size = self.model.config.vocab_size

    def answers(self, temperature: float, drafts: list[list[int]] | None = None) -> list[list[int]]:
        """Answers, or corrections of drafts, without the ids that ended them."""
        sampling = Sampling(
            temperature=temperature, banned_ids=tuple(self.chat.banned_ids(self.vocab_size, keep=self.stop_ids))
        )
        cue_ids = self.chat.correction_ids(CUE)
        requests = []
        for i, example in enumerate(self.examples):
            prompt_ids = example.prompt_ids + (drafts[i] + cue_ids if drafts else [])
            key = sequence_key(SEED, Stream.EVALUATION, example.id, 1 if drafts else 0)
            requests.append(free_request(prompt_ids, self.max_answer, key, self.stop_ids))
        return [content_ids(result) for result in self.sampler.sample(requests, sampling, 1)[0]]

    def is_right(self, answers: list[list[int]]) -> list[int]:
        pairs = zip(answers, self.examples, strict=True)
        return [int(exact_match(self.chat.decode(ids), example.gold_text)) for ids, example in pairs]

    def contexts(self, rate: float) -> list[list[int]]:
        """Mixed contexts; at every rate from the same coins and noise."""
        sampling = Sampling(banned_ids=tuple(self.chat.banned_ids(self.vocab_size)))
        requests = [
            bss_request(example, rate, sequence_key(SEED, Stream.BSS, example.id, 0)) for example in self.examples
        ]
        return [result.tokens for result in self.sampler.sample(requests, sampling, 4)[0]]

    @torch.no_grad()
    def gold_given(self, contexts: list[list[int]]) -> dict[str, float]:
        """Mean NLL (nats) and top-1 accuracy of the gold tokens after these contexts."""
        nll, right, count = 0.0, 0, 0
        for begin in range(0, len(contexts), ROWS):
            pairs = zip(self.examples[begin : begin + ROWS], contexts[begin : begin + ROWS], strict=True)
            batch = collate([context_sequence(example, mixed_ids) for example, mixed_ids in pairs], "cpu")
            logits_NV = self.model(input_ids=batch.input_ids_BL, use_cache=False).logits.flatten(0, 1)
            logits_NV = logits_NV[batch.predicting_N]
            nll += F.cross_entropy(logits_NV, batch.labels_N, reduction="sum").item()
            right += int((logits_NV.argmax(-1) == batch.labels_N).sum())
            count += len(batch.labels_N)
        return {"nll": nll / count, "top1": right / count}


def measure(subject: Subject, corrects: bool, sft_contexts: Contexts | None) -> tuple[dict[str, Any], Contexts]:
    """All figures of one model, and its own contexts. Lists are in the order of the held-out prompts.

    Args:
        corrects: whether it has learnt to correct: then each answer also gets one correction turn.
        sft_contexts: those of the SFT model of the same seed; None: this is that model.
    """
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answers = subject.answers(temperature)
        found[name] = subject.is_right(answers)
        if name == "greedy":
            found["free_running"] = token_accuracy(answers, [example.response_ids[:-1] for example in subject.examples])
        if corrects:
            found[f"{name}_corrected"] = subject.is_right(subject.answers(temperature, answers))
    own = {rate: subject.contexts(rate) for rate in RATES}
    found["teacher_forced"] = subject.gold_given(own[0.0])["top1"]
    found["gap"] = {
        "own": {str(rate): subject.gold_given(contexts) for rate, contexts in own.items()},
        "sft": {str(rate): subject.gold_given(contexts) for rate, contexts in (sft_contexts or own).items()},
    }
    return found, own


def token_accuracy(answers: list[list[int]], golds: list[list[int]]) -> float:
    """Share of gold tokens that stand at their own place of the answer."""
    right = sum(a == g for answer, gold in zip(answers, golds, strict=True) for a, g in zip(answer, gold, strict=False))
    return right / sum(map(len, golds))

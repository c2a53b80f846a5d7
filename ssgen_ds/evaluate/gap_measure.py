"""The training-inference gap: gold tokens are scored after contexts that the model wrote itself.

For each mix rate the one sampler makes a context for every example, as in BSS, and the gold tokens are scored after it:
rate 0 is what training sees, rate 1 what the model sees when it answers. Gold after sampled tokens is harder even for
a perfect model, so models are compared with each other: each on its own contexts, and all on those of the first.

An example has one key for its coins and its noise, whatever the rate and the model: a token that is sampled at one rate
is sampled at all higher ones, and curves differ by their models alone. No training run uses these keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.data.window import shard_by_length
from ssgen_ds.errors import NonFiniteError
from ssgen_ds.evaluate.gap_options import FREE, GOLD
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.loss import CHUNK_LOGITS, check_loss
from ssgen_ds.modeling.pieces import Piece, cut
from ssgen_ds.modeling.project import Head, instead_of_logits
from ssgen_ds.sampler.block import BlockChooser
from ssgen_ds.sampler.engine import EngineSampler
from ssgen_ds.sampler.filters import Sampling, SamplingSettings
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.sampler.requests import OnDone, OnDoneOf
from ssgen_ds.selfgen.bss import bss_request

RATES = (GOLD, 0.05, 0.1, 0.25, 0.5, FREE)
TOKENS_PER_CALL = 2**14  # scored in one call on a rank, padding included; more would not be faster
Contexts = dict[float, list[list[int]]]  # mix rate -> the context of each example, as long as its gold response


@dataclass(frozen=True)
class GapSettings(SamplingSettings):
    """How contexts are made. `rates`: ascending, from 0 to 1."""

    rates: tuple[float, ...] = RATES
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """For one example's gold tokens, in order: NLL in nats (float32), and whether each was the likeliest token."""

    nll_T: np.ndarray
    hit_T: np.ndarray


Scored = dict[float, list[Scores]]  # mix rate -> the scores of each example


@dataclass(frozen=True)
class Stretch:
    """What one row reads from position `begin` on; the labels are predicted from its last tokens."""

    begin: int
    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Measurement:
    """One model's contexts, and its scores on them and on the first model's: the same ones for the first."""

    contexts: Contexts
    own: Scored
    shared: Scored
    sampled_share: dict[float, float]  # mix rate -> share of response tokens that were sampled, gold or not


def measure(
    sampler: EngineSampler,
    chat: ChatFormat,
    examples: list[Example],
    vocab_size: int,
    settings: GapSettings,
    first: Contexts | None,
    on_done_of: OnDoneOf = lambda phase: lambda done, total: None,
) -> Measurement:
    """Measure one model; all ranks call it with the same arguments and get the same result.

    Args:
        vocab_size: width of the model's logits.
        first: contexts of the first model; None: this is the first.

    Raises:
        UserError: the model computes its logits in a way that is not known here.
        GenerationInterrupted, NonFiniteError: as the sampler does.
    """
    sampling = Sampling.of(settings, chat.banned_ids(vocab_size))  # as in BSS: no end of a turn in mid-context
    keys = [context_key(settings.seed, example.id) for example in examples]
    contexts, sampled_share = Contexts(), {}
    with sampler.ready():
        sampler.world.together(lambda: _check_model(sampler.module))
        blocks = BlockChooser("auto", sampler, vocab_size)
        for rate in settings.rates:
            # Another model's context from the same noise is a good guess; it changes the cost, not the tokens.
            guesses = first[rate] if first is not None else [None] * len(examples)
            requests = [
                bss_request(example, rate, key, guess_ids)
                for example, key, guess_ids in zip(examples, keys, guesses, strict=True)
            ]
            results, _, _ = sampler.sample(
                requests, sampling, blocks.mixing(requests), on_done_of(f"contexts at {rate:g}")
            )
            contexts[rate] = [result.tokens for result in results]
            sampled_share[rate] = float(np.mean([coin for request in requests for coin in request.coins]))
        others = (
            {} if first is None else {rate: first[rate] for rate in settings.rates if first[rate] != contexts[rate]}
        )
        scores = score_gold(sampler, examples, [*contexts.values(), *others.values()], on_done_of("scoring"))
    own = dict(zip(contexts, scores, strict=False))
    return Measurement(contexts, own, own | dict(zip(others, scores[len(own) :], strict=True)), sampled_share)


def context_key(seed: int, example_id: str) -> int:
    """The key of the coins and the noise of one example's contexts. None of its answers has the same key."""
    return sequence_key(seed, Stream.EVALUATION, f"{example_id}\x1egap", 0)


def _check_model(model: torch.nn.Module) -> None:
    """Make the checks of training: a model from elsewhere has not passed them yet."""
    check_cache(model)
    check_loss(model, is_packed=False)


def score_gold(
    sampler: EngineSampler,
    examples: list[Example],
    contexts: list[list[list[int]]],
    on_done: OnDone = lambda done, total: None,
) -> list[list[Scores]]:
    """The gold tokens of each example after each of its contexts; all ranks pass the same arguments and get all scores.

    Works in every strategy of the sampler: under ZeRO-3 ranks may have different numbers of batches. A prompt is read
    once for all its contexts.

    Args:
        contexts: several for each example, the examples in order within each; as long as the gold responses.
    """
    world, lengths = sampler.world, [len(example.prompt_ids) + len(example.response_ids) for example in examples]
    shards = shard_by_length(lengths, world.size, sampler.limit.rows_of(max(lengths)), TOKENS_PER_CALL)
    step = max(1, CHUNK_LOGITS // sampler.module.config.get_text_config().vocab_size)

    def score_mine() -> list[list[Scores]]:
        model = CachedCausalLM(sampler.module, sampler.before_call, world.device)
        scorer, found, done = GoldScorer(model, step, sampler.limit.call.tokens), [], 0
        for micro in shards[world.rank]:
            found.append(scorer([examples[i] for i in micro], [[texts[i] for i in micro] for texts in contexts]))
            done = min(done + len(micro) * world.size, len(examples))
            on_done(done, len(examples))
        return [[scores for part in found for scores in part[n]] for n in range(len(contexts))]

    parts = sampler.share(score_mine)
    order = [i for shard in shards for micro in shard for i in micro]
    places = np.argsort(order)
    everyones = [[scores for part in parts for scores in part[n]] for n in range(len(contexts))]
    return [[scores[place] for place in places] for scores in everyones]


@dataclass
class GoldScorer:
    """Scores gold tokens after contexts, a batch of examples at a time.

    Args:
        model: whose loss is the negative log-likelihood (NLL) of a gold token.
        step: rows of logits that exist at once.
        tokens: fed in one call; what is longer is read in several.
    """

    model: CachedCausalLM
    step: int
    tokens: int

    def __call__(self, examples: list[Example], contexts: list[list[list[int]]]) -> list[list[Scores]]:
        """The scores of each example, for each of several contexts. Raises NonFiniteError."""
        longest = max(len(example.prompt_ids) + len(example.response_ids) for example in examples)
        self.model.open(len(examples), longest)
        prompts = [Stretch(0, example.prompt_ids, example.response_ids[:1]) for example in examples]
        first = self._read(prompts)
        scores = []
        for texts in contexts:
            pairs = zip(examples, texts, strict=True)
            stretches = [Stretch(len(e.prompt_ids), ids[:-1], e.response_ids[1:]) for e, ids in pairs]
            rest = self._read(stretches) if any(stretch.labels for stretch in stretches) else [_NOTHING] * len(examples)
            scores.append([_joined(*pair) for pair in zip(first, rest, strict=True)])
        return scores

    @torch.no_grad()
    def _read(self, stretches: list[Stretch]) -> list[Scores]:
        """Feed a stretch of each row, after the remembered keys and values of what came before."""
        labels_N = torch.tensor([label for stretch in stretches for label in stretch.labels], device=self.model.device)
        nll: list[torch.Tensor] = []
        hit: list[torch.Tensor] = []
        pieces = [
            Piece(row, one.begin, one.ids, range(len(one.ids) - len(one.labels), len(one.ids)))
            for row, one in enumerate(stretches)
        ]

        def compute(rows_NH: torch.Tensor, head: Head, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
            done = sum(map(len, nll))
            labels_of_call = labels_N[done : done + len(rows_NH)]
            for rows_CH, labels_C in zip(rows_NH.split(self.step), labels_of_call.split(self.step), strict=True):
                logits_CV = head(rows_CH)
                nll.append(F.cross_entropy(logits_CV, labels_C, reduction="none"))
                hit.append(logits_CV.argmax(-1) == labels_C)
            return rows_NH.new_zeros(())

        with instead_of_logits(self.model.model, compute):
            for call in cut(pieces, self.tokens, len(labels_N)):
                self.model(call)
        nll_N, hit_N = torch.cat(nll).cpu().numpy(), torch.cat(hit).cpu().numpy()
        if not np.isfinite(nll_N).all():
            raise NonFiniteError("the NLL of a gold token is not finite")
        ends = np.cumsum([len(stretch.labels) for stretch in stretches])[:-1]
        return [Scores(*pair) for pair in zip(np.split(nll_N, ends), np.split(hit_N, ends), strict=True)]


_NOTHING = Scores(np.zeros(0, np.float32), np.zeros(0, bool))


def _joined(first: Scores, rest: Scores) -> Scores:
    return Scores(np.concatenate([first.nll_T, rest.nll_T]), np.concatenate([first.hit_T, rest.hit_T]))

"""A round: everything the model generates for the next `refresh_every` optimizer steps, with the current weights.

    plan items -> BSS mixed contexts, RAC drafts -> cuts -> rewrites -> records -> training sequences

Records are complete: a round written to disk and read back trains exactly as the one in memory, on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ssgen_ds.config import Recipe, SamplingConfig
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.evaluate.metrics import score
from ssgen_ds.selfgen import bss, rac
from ssgen_ds.selfgen.block import BlockChooser, name
from ssgen_ds.selfgen.engine_sampler import EngineSampler
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.noise import Stream, sequence_key
from ssgen_ds.selfgen.requests import Request, Sampled, SamplerStats
from ssgen_ds.window import Sequence

PhaseProgress = Callable[[str, int, int], None]  # phase, sequences done, sequences in all


@dataclass(frozen=True)
class Slot:
    """One example at the optimizer step (0-based) that trains on it."""

    step: int
    example: Example
    visit: int
    mix_rate: float


@dataclass
class Generated:
    """What was generated for one slot. None: the method does not generate it, or nothing was to be generated."""

    step: int
    example_id: str
    visit: int
    mix_rate: float
    gold_ids: list[int]
    coins: list[bool] | None = None
    mixed_ids: list[int] | None = None
    bss_passes: int = 0
    draft_ids: list[int] | None = None  # without the stop id
    draft_stop_id: int | None = None  # that ended it; None: it ran out of tokens
    draft_kept: int | None = None  # tokens of the draft that the cut keeps
    rewrite_ids: list[int] | None = None  # without the stop id
    rewrite_stop_id: int | None = None
    target_ids: list[int] | None = None  # of the correction; None: no correction example
    target_kind: str | None = None  # reference | rewrite


@dataclass
class RoundStats:
    """Cost of one round, over all ranks."""

    seconds: float = 0.0
    sampler: SamplerStats = field(default_factory=SamplerStats)
    strategy: str = ""
    block: str = ""  # coins tried in a pass over mixed contexts, and over drafts


@dataclass
class _Work:
    """One slot, what is generated for it, and what was when its example was last visited."""

    slot: Slot
    record: Generated
    before: Generated | None

    @classmethod
    def of(cls, slot: Slot, before: Generated | None) -> _Work:
        gold_ids = slot.example.response_ids
        if before is not None and before.gold_ids != gold_ids:  # streamed ids may repeat: this is another example
            before = None
        return cls(slot, Generated(slot.step, slot.example.id, slot.visit, slot.mix_rate, gold_ids), before)


@dataclass
class RoundGenerator:
    """Generates rounds by the recipe's method. Every rank calls it with the same slots and gets the same records."""

    recipe: Recipe
    chat: ChatFormat
    vocab_size: int
    sampler: EngineSampler
    blocks: BlockChooser

    @property
    def uses_earlier(self) -> bool:
        """Whether earlier visits make generation cheaper: drafts always resemble theirs, contexts by common noise."""
        return self._drafts or (self.recipe.method.uses_bss and self.recipe.selfgen.noise == "common")

    @property
    def _drafts(self) -> bool:
        return self.recipe.method.uses_rac and self.recipe.method.rac.correction_weight > 0

    def generate(
        self,
        slots: list[Slot],
        progress: PhaseProgress = lambda phase, done, total: None,
        earlier: dict[str, Generated] | None = None,
    ) -> tuple[list[Generated], RoundStats]:
        """One record for each slot, in order.

        `earlier` holds the previous visit of examples, by id. They are guesses: they change the cost, not the tokens.
        """
        stats = RoundStats(strategy=self.sampler.strategy)
        work = [_Work.of(slot, (earlier or {}).get(slot.example.id)) for slot in slots]
        method = self.recipe.method
        mixes = method.uses_bss and any(slot.mix_rate > 0 for slot in slots)
        if mixes or self._drafts:
            start = time.perf_counter()
            with self.sampler.ready():
                if mixes:
                    self._mix(work, stats, progress)
                if self._drafts:
                    self._draft(work, stats, progress)
                if self._drafts and method.rac.target == "rewrite":
                    self._rewrite([item for item in work if item.record.draft_ids], stats, progress)
            stats.seconds = time.perf_counter() - start
        return [item.record for item in work], stats

    def _key(self, slot: Slot, stream: Stream) -> int:
        visit = slot.visit if self.recipe.selfgen.noise == "fresh" else 0
        return sequence_key(self.recipe.train.seed, stream, slot.example.id, visit)

    def _sample(
        self,
        requests: list[Request],
        sampling: Sampling,
        block: int | None,
        stats: RoundStats,
        phase: str,
        progress: PhaseProgress,
    ) -> list[Sampled]:
        with self.sampler.world.phase(phase):
            results, cost, _ = self.sampler.sample(
                requests, sampling, block, lambda done, total: progress(phase, done, total)
            )
        stats.sampler.add(cost)
        stats.block += f"{', ' if stats.block else ''}{phase} {name(block)}"
        return results

    def _mix(self, work: list[_Work], stats: RoundStats, progress: PhaseProgress) -> None:
        sampling = self._sampling(self.recipe.method.bss, keep=())
        requests = []
        for item in work:
            slot, before = item.slot, item.before
            guess_ids = before.mixed_ids if before and self.recipe.selfgen.noise == "common" else None
            requests.append(bss.bss_request(slot.example, slot.mix_rate, self._key(slot, Stream.BSS), guess_ids))
        results = self._sample(requests, sampling, self.blocks.mixing(requests), stats, "mixing", progress)
        for item, request, result in zip(work, requests, results, strict=True):
            record = item.record
            record.coins, record.mixed_ids, record.bss_passes = request.coins, result.tokens, result.passes

    def _draft(self, work: list[_Work], stats: RoundStats, progress: PhaseProgress) -> None:
        settings = self.recipe.method.rac
        requests = []
        for item in work:
            before = item.before
            earlier_ids = rac.sampled_ids(before.draft_ids, before.draft_stop_id) if before else []
            prompt_ids = item.slot.example.prompt_ids
            requests.append(
                self._free_request(item.slot, Stream.DRAFT, prompt_ids, settings.max_draft_tokens, earlier_ids)
            )
        sampling = self._sampling(settings, keep=self.chat.stop_ids)
        results = self._sample(requests, sampling, self.blocks.drafting(), stats, "drafting", progress)
        for item, result in zip(work, results, strict=True):
            slot, record = item.slot, item.record
            record.draft_ids, record.draft_stop_id = rac.content_ids(result), rac.stop_id(result)
            record.draft_kept = rac.kept_length(len(record.draft_ids), settings.cut, self._key(slot, Stream.CUT))
            if record.draft_ids:
                record.target_ids, record.target_kind = record.gold_ids, "reference"

    def _rewrite(self, work: list[_Work], stats: RoundStats, progress: PhaseProgress) -> None:
        settings = self.recipe.method.rac
        requests = []
        for item in work:
            slot, before = item.slot, item.before
            earlier_ids = rac.sampled_ids(before.rewrite_ids, before.rewrite_stop_id) if before else []
            cue_ids = self.chat.correction_ids(settings.rewrite_cue.replace("{reference}", slot.example.reference))
            prompt_ids = slot.example.prompt_ids + item.record.draft_ids + cue_ids
            budget = self.recipe.data.max_response_tokens
            requests.append(self._free_request(slot, Stream.REWRITE, prompt_ids, budget, earlier_ids))
        sampling = self._sampling(settings, keep=self.chat.stop_ids)
        results = self._sample(requests, sampling, self.blocks.drafting(), stats, "rewriting", progress)
        for item, result in zip(work, results, strict=True):
            record, gold = item.record, item.slot.example.reference
            record.rewrite_ids, record.rewrite_stop_id = rac.content_ids(result), rac.stop_id(result)
            draft_score = score(settings.metric, self.chat.decode(record.draft_ids), gold)
            rewrite_score = score(settings.metric, self.chat.decode(record.rewrite_ids), gold)
            # A rewrite that ran out of tokens has no end to learn from.
            if result.stopped and rac.accept_rewrite(rewrite_score, draft_score):
                record.target_ids = [*record.rewrite_ids, self.chat.turn_end_id]
                record.target_kind = "rewrite"

    def _free_request(
        self, slot: Slot, stream: Stream, prompt_ids: list[int], max_tokens: int, earlier_ids: list[int]
    ) -> Request:
        """A draft or a rewrite; `earlier_ids` is that of the previous visit, [] when there was none."""
        same_noise = self.recipe.selfgen.noise == "common" or self.recipe.method.rac.temperature == 0
        return rac.free_request(
            prompt_ids,
            max_tokens,
            self._key(slot, stream),
            frozenset(self.chat.stop_ids),
            guess_ids=earlier_ids if same_noise else [],
            corpora=(earlier_ids, slot.example.response_ids) if earlier_ids else (slot.example.response_ids,),
        )

    def _sampling(self, settings: SamplingConfig, keep: frozenset[int] | tuple[int, ...]) -> Sampling:
        banned = tuple(self.chat.banned_ids(self.vocab_size, keep=keep))
        return Sampling(settings.temperature, settings.top_k, settings.top_p, banned)

    def sequences(self, slot: Slot, record: Generated) -> list[Sequence]:
        """The training sequences of one slot: the example itself and, with RAC, its correction."""
        sequences = [bss.context_sequence(slot.example, record.mixed_ids)]
        if record.target_ids is not None:
            rac_settings = self.recipe.method.rac
            cue_ids = self.chat.correction_ids(rac_settings.correction_cue)
            draft_ids = record.draft_ids[: record.draft_kept]
            sequences.append(
                rac.correction_sequence(
                    slot.example, draft_ids, cue_ids, record.target_ids, rac_settings.correction_weight
                )
            )
        return sequences

"""A round: everything the model generates for the next `refresh_every` optimizer steps, with the current weights.

    plan items -> BSS mixed contexts, RAC drafts -> cuts -> rewrites -> records -> training sequences

Records are complete: a round written to disk and read back trains exactly as the one in memory, on any number of ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.data.window import Sequence
from ssgen_ds.metrics.text import score_text
from ssgen_ds.recipe.schema import Recipe, SamplingConfig
from ssgen_ds.sampler.block import BlockChooser, block_name
from ssgen_ds.sampler.engine import EngineSampler, Recorder
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.free import FreeSample, free_request, free_sample
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.sampler.requests import OnDoneOf, Request, Sampled, SamplerStats
from ssgen_ds.selfgen import bss, rac
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Slot, Target


@dataclass
class RoundStats:
    """Cost of one round, over all ranks."""

    seconds: float = 0.0
    sampler: SamplerStats = field(default_factory=SamplerStats)
    strategy: str = ""
    block: str = ""  # coins tried in a pass over mixed contexts, and over drafts


@dataclass
class _Work:
    """One slot, what is generated for it, and what was generated when its example was last visited."""

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
    recorder: Recorder | None = None  # of what the sampler computes for mixed contexts

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
        on_done_of: OnDoneOf = lambda phase: lambda done, total: None,
        earlier: dict[str, Generated] | None = None,
    ) -> tuple[list[Generated], RoundStats]:
        """One record for each slot, in order.

        `earlier` holds the previous visit of examples, by id. They are guesses: they change the cost, not the tokens.
        """
        stats = RoundStats(strategy=self.sampler.strategy.name)
        work = [_Work.of(slot, (earlier or {}).get(slot.example.id)) for slot in slots]
        method = self.recipe.method
        mixes = method.uses_bss and any(slot.mix_rate > 0 for slot in slots)
        if mixes or self._drafts:
            start = time.perf_counter()
            with self.sampler.ready():
                if mixes:
                    self._mix(work, stats, on_done_of)
                if self._drafts:
                    self._draft(work, stats, on_done_of)
                if self._drafts and method.rac.target == "rewrite":
                    self._rewrite([item for item in work if _draft_ids(item)], stats, on_done_of)
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
        on_done_of: OnDoneOf,
        recorder: Recorder | None = None,
    ) -> list[Sampled]:
        with self.sampler.world.phase(phase):
            results, cost, _ = self.sampler.sample(requests, sampling, block, on_done_of(phase), recorder)
        stats.sampler.add(cost)
        stats.block += f"{', ' if stats.block else ''}{phase} {block_name(block)}"
        return results

    def _mix(self, work: list[_Work], stats: RoundStats, on_done_of: OnDoneOf) -> None:
        sampling = self._sampling(self.recipe.method.bss, keep=())
        requests = []
        for item in work:
            slot, before = item.slot, item.before
            guess_ids = None
            if before and before.mixed and self.recipe.selfgen.noise == "common":
                guess_ids = before.mixed.ids
            key = self._key(slot, Stream.BSS)
            requests.append(bss.bss_request(slot.example, slot.mix_rate, key, guess_ids))
        recorder = self.recorder
        for request in requests:
            request.feeds_all = recorder is not None
        block = self.blocks.mixing(requests)
        results = self._sample(requests, sampling, block, stats, "mixing", on_done_of, recorder)
        for item, request, result in zip(work, requests, results, strict=True):
            item.record.mixed = Mixed(request.coins, result.tokens, result.passes)

    def _draft(self, work: list[_Work], stats: RoundStats, on_done_of: OnDoneOf) -> None:
        settings = self.recipe.method.rac
        requests = []
        for item in work:
            slot, before = item.slot, item.before
            prompt_ids, budget = slot.example.prompt_ids, settings.max_draft_tokens
            earlier = before.draft if before else None
            requests.append(self._free_request(slot, Stream.DRAFT, prompt_ids, budget, earlier))
        sampling = self._sampling(settings, keep=self.chat.stop_ids)
        results = self._sample(requests, sampling, self.blocks.drafting(requests), stats, "drafting", on_done_of)
        for item, result in zip(work, results, strict=True):
            slot, record = item.slot, item.record
            sample = free_sample(result)
            kept = rac.kept_length(len(sample.ids), settings.cut, self._key(slot, Stream.CUT))
            record.draft = Draft(sample.ids, sample.stop_id, kept)
            if sample.ids:
                record.target = Target(record.gold_ids, "reference")

    def _rewrite(self, work: list[_Work], stats: RoundStats, on_done_of: OnDoneOf) -> None:
        settings = self.recipe.method.rac
        requests = []
        for item in work:
            slot, before = item.slot, item.before
            cue_ids = self.chat.correction_ids(settings.rewrite_cue.replace("{reference}", slot.example.gold_text))
            prompt_ids = [*slot.example.prompt_ids, *_draft_ids(item), *cue_ids]
            budget = self.recipe.data.max_response_tokens
            earlier = before.rewrite if before else None
            requests.append(self._free_request(slot, Stream.REWRITE, prompt_ids, budget, earlier))
        sampling = self._sampling(settings, keep=self.chat.stop_ids)
        results = self._sample(requests, sampling, self.blocks.drafting(requests), stats, "rewriting", on_done_of)
        for item, result in zip(work, results, strict=True):
            record, gold = item.record, item.slot.example.gold_text
            record.rewrite = free_sample(result)
            draft_score = score_text(settings.metric, self.chat.decode(_draft_ids(item)), gold)
            rewrite_score = score_text(settings.metric, self.chat.decode(record.rewrite.ids), gold)
            # A rewrite that ran out of tokens has no end to learn from.
            if result.stopped and rac.accept_rewrite(rewrite_score, draft_score):
                record.target = Target([*record.rewrite.ids, self.chat.turn_end_id], "rewrite")

    def _free_request(
        self, slot: Slot, stream: Stream, prompt_ids: list[int], max_tokens: int, earlier: FreeSample | None
    ) -> Request:
        """A draft or a rewrite; `earlier` is that of the previous visit, None when there was none."""
        earlier_ids = earlier.sampled_ids if earlier else []
        same_noise = self.recipe.selfgen.noise == "common" or self.recipe.method.rac.temperature == 0
        return free_request(
            prompt_ids,
            max_tokens,
            self._key(slot, stream),
            frozenset(self.chat.stop_ids),
            guess_ids=earlier_ids if same_noise else [],
            corpora=(earlier_ids, slot.example.response_ids) if earlier_ids else (slot.example.response_ids,),
        )

    def _sampling(self, settings: SamplingConfig, keep: frozenset[int] | tuple[int, ...]) -> Sampling:
        return Sampling.of(settings, self.chat.banned_ids(self.vocab_size, keep=keep))

    def sequences(self, slot: Slot, record: Generated) -> list[Sequence]:
        """The training sequences of one slot: the example itself and, with RAC, its correction."""
        sequences = [bss.context_sequence(slot.example, record.mixed.ids if record.mixed else None)]
        if record.target and record.draft:
            settings = self.recipe.method.rac
            cue_ids, weight = self.chat.correction_ids(settings.correction_cue), settings.correction_weight
            kept_ids, target_ids = record.draft.kept_ids, record.target.ids
            sequences.append(rac.correction_sequence(slot.example, kept_ids, cue_ids, target_ids, weight))
        return sequences


def _draft_ids(item: _Work) -> list[int]:
    return item.record.draft.ids if item.record.draft else []

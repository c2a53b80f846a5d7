"""Rounds without a model: what is asked of the sampler, and what becomes of its answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from ssgen_ds.data.records import Record
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.data.window import IGNORE
from ssgen_ds.distributed.world import World
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.sampler.block import BlockChooser
from ssgen_ds.sampler.free import free_request
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.sampler.requests import Request, Sampled, SamplerStats
from ssgen_ds.sampler.strategy import Local, Strategy
from ssgen_ds.selfgen import rac
from ssgen_ds.selfgen.bss import draw_coins
from ssgen_ds.selfgen.generated import Draft, Generated, Mixed, Slot
from ssgen_ds.selfgen.rounds import RoundGenerator
from ssgen_ds.selfgen.samples import mixed_runs
from tests.support.tiny_models import tiny_tokenizer


@dataclass
class ScriptedSampler:
    """Answers each call with the next texts of its script, and remembers what it was asked."""

    chat: ChatFormat
    script: list[list[str]]
    asked: list[list[Request]] = field(default_factory=list)
    settings: list[tuple] = field(default_factory=list)
    strategy: Strategy = field(default_factory=Local)
    world: World = field(default_factory=lambda: World(0, 0, 1, torch.device("cpu"), control=None))

    def ready(self):
        return nullcontext()

    def sample(self, requests, sampling, block, progress=None, recorder=None):
        self.asked.append(requests)
        self.settings.append((sampling, block))
        answers = []
        for text in self.script[len(self.asked) - 1]:
            stopped = not text.endswith("…")  # "…" marks an answer that ran out of tokens
            ids = ids_of(self.chat, text.removesuffix("…"))
            answers.append(Sampled([*ids, self.chat.turn_end_id] if stopped else ids, passes=1, stopped=stopped))
        return answers, SamplerStats(calls=1), 0.5


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(chat: ChatFormat, ids: list[int]) -> str:
    return chat.decode(ids).replace("<unk>", "\n")  # the tiny vocabulary has no line break


def make(
    script: list[list[str]], noise: str = "fresh", **rac_settings
) -> tuple[RoundGenerator, list[Slot], ScriptedSampler]:
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "method": {"name": "rac", "rac": {"correction_cue": "Fix", "metric": "f1", **rac_settings}},
            "selfgen": {"noise": noise},
            "train": {"max_steps": 1},
            "output_dir": "r",
        }
    )
    chat = ChatFormat(tiny_tokenizer(), recipe.data)
    rows = [("a b", "red cat"), ("c d", "blue dog")]
    slots = []
    for i, (prompt, completion) in enumerate(rows):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        slots.append(Slot(0, chat.encode(Record(f"id-{i}", messages, "here", "hash")), visit=3, mix_rate=0.0))
    sampler = ScriptedSampler(chat, script)
    return RoundGenerator(recipe, chat, 96, sampler, BlockChooser(1, sampler, 96)), slots, sampler


def test_correction_example():
    """x, the draft verbatim, the cue, the gold answer; loss on the gold answer only, at its weight."""
    generator, slots, sampler = make([["green cow", ""]], correction_weight=0.5)
    records, stats = generator.generate(slots)
    chat = generator.chat
    assert stats.seconds > 0
    plain, correction = generator.sequences(slots[0], records[0])
    assert text_of(chat, correction.input_ids) == "a b\n\ngreen cow\n\nFix\n\nred cat</s>"
    target = [*ids_of(chat, "red cat"), chat.turn_end_id]
    assert [label for label in correction.labels if label != IGNORE] == target
    assert correction.labels[-len(target) :] == target
    assert (plain.weight, correction.weight) == (1.0, 0.5)
    assert [label for label in plain.labels if label != IGNORE] == target
    # the second draft is empty: no correction, and its example is trained all the same
    assert records[1].draft.ids == []
    assert len(generator.sequences(slots[1], records[1])) == 1
    # drafts stop at stop ids, which are not banned; other special ids are
    sampling, block = sampler.settings[0]
    assert block == 1
    assert chat.turn_end_id not in sampling.banned_ids
    assert {0, 1} <= set(sampling.banned_ids)


def test_weight_zero_drafts_nothing():
    generator, slots, sampler = make([], correction_weight=0.0)
    records, _ = generator.generate(slots)
    assert sampler.asked == []
    assert [record.target for record in records] == [None, None]


@pytest.mark.parametrize(
    ("draft", "rewrite", "kind"),
    [
        ("red cow", "red cat", "rewrite"),  # fully correct
        ("green cow", "red cow", "rewrite"),  # strictly closer
        ("red cow", "red dog", "reference"),  # as far away
        ("red cat", "green cow", "reference"),  # further
        ("green cow", "red cat…", "reference"),  # never ended
        ("red cat", "red cat", "rewrite"),  # correct already, and still
    ],
)
def test_rewrite_is_used_only_when_closer(draft, rewrite, kind):
    generator, slots, sampler = make([[draft, "x"], [rewrite, "y"]], target="rewrite")
    record = generator.generate(slots)[0][0]
    assert record.target.kind == kind
    expected = rewrite if kind == "rewrite" else "red cat"
    assert record.target.ids == [*ids_of(generator.chat, expected), generator.chat.turn_end_id]
    prompt = text_of(generator.chat, sampler.asked[1][0].prompt_ids)
    assert f"{draft}\n\nThe reference answer is:\n\nred cat" in prompt


def test_the_correction_sees_what_the_cut_keeps_and_the_rewrite_the_whole_draft():
    generator, slots, sampler = make([["green cow", "x"], ["red cat", "y"]], cut="uniform", target="rewrite")
    slots = [replace(slots[0], visit=_visit_whose_cut_keeps(3, "green cow", slots[0])), slots[1]]
    records, _ = generator.generate(slots)
    assert (records[0].draft.kept, text_of(generator.chat, records[0].draft.ids)) == (3, "green cow")
    rewrite_prompt = text_of(generator.chat, sampler.asked[1][0].prompt_ids)
    assert rewrite_prompt.startswith("a b\n\ngreen cow\n\nThe reference answer is")
    _, correction = generator.sequences(slots[0], records[0])
    assert text_of(generator.chat, correction.input_ids) == "a b\n\ngre\n\nFix\n\nred cat</s>"


def _visit_whose_cut_keeps(length: int, draft: str, slot: Slot) -> int:
    """The stream of cuts, seed 0; a visit is part of its key."""
    keys = (sequence_key(0, Stream.CUT, slot.example.id, visit) for visit in range(999))
    return next(visit for visit, key in enumerate(keys) if rac.kept_length(len(draft), "uniform", key) == length)


def test_nothing_stops_in_mid_context_and_a_draft_may():
    """An end token there would be followed by a gold label that cannot follow it: banned, and no stop id either."""
    generator, slots, sampler = make([["x", "x"], ["x", "x"]])
    generator.recipe.method.name = "bss+rac"
    generator.generate([replace(slot, mix_rate=0.9) for slot in slots])
    end = generator.chat.turn_end_id
    (mixing, _), (drafting, _) = sampler.settings
    assert {*generator.chat.special_ids, *generator.chat.stop_ids} <= set(mixing.banned_ids)
    assert end in mixing.banned_ids and end not in drafting.banned_ids
    assert {request.stop_ids for request in sampler.asked[0]} == {frozenset()}
    assert {request.stop_ids for request in sampler.asked[1]} == {frozenset(generator.chat.stop_ids)}
    assert not any(request.coins[-1] for request in sampler.asked[0])


def test_streams_and_slots_have_noise_of_their_own():
    """A context, a draft and a rewrite of one example share no key, and each slot has its own."""
    generator, slots, sampler = make([["x", "x"], ["ab", "ab"], ["ab", "ab"]], target="rewrite")
    generator.recipe.method.name = "bss+rac"
    generator.generate([replace(slot, mix_rate=0.9) for slot in slots])
    streams = (Stream.BSS, Stream.DRAFT, Stream.REWRITE)
    assert [[request.key for request in asked] for asked in sampler.asked] == [
        [sequence_key(0, stream, slot.example.id, slot.visit) for slot in slots] for stream in streams
    ]


def test_each_slot_draws_its_coins_at_its_own_rate():
    generator, slots, sampler = make([["x", "x", "x"]])
    generator.recipe.method.name = "bss"
    three = [replace(slots[0], step=step, mix_rate=rate) for step, rate in enumerate((0.0, 0.4, 1.0))]
    records, _ = generator.generate(three)
    asked = [sum(request.coins) for request in sampler.asked[0]]
    assert asked[0] == 0 < asked[1] < asked[2] == len(three[0].example.response_ids) - 1
    assert [(record.step, record.mix_rate) for record in records] == [(0, 0.0), (1, 0.4), (2, 1.0)]


def test_noise_fresh_uses_the_visit_and_common_does_not():
    generator, slots, _ = make([])
    later = Slot(0, slots[0].example, visit=4, mix_rate=0.0)
    assert generator._key(slots[0], Stream.BSS) != generator._key(later, Stream.BSS)
    generator.recipe.selfgen.noise = "common"
    assert generator._key(slots[0], Stream.BSS) == generator._key(later, Stream.BSS)


def test_runs_of_gold_and_sampled_text():
    generator, _, _ = make([])
    gold = ids_of(generator.chat, "red cat")
    coins = [False, False, True, True, False, False, False]
    assert mixed_runs(Mixed(coins, gold, 1), generator.chat) == [("re", False), ("d ", True), ("cat", False)]


# -- guesses -----------------------------------------------------------------------------------------------------------


def guess_of(request: Request) -> list[int]:
    return request.guess_ids[: request.guess_length]


@pytest.mark.parametrize(
    ("noise", "temperature", "same_noise"), [("fresh", 1.0, False), ("common", 1.0, True), ("fresh", 0.0, True)]
)
def test_drafts_and_rewrites_guess_what_was_generated_before(noise, temperature, same_noise):
    """Position by position where the noise is the same, stop id included; as a corpus ahead of the reference always."""
    script = [["red cow", "blue…"], ["red dog", "blue dog"]]
    generator, slots, sampler = make(script + script, noise=noise, temperature=temperature, target="rewrite")
    first, _ = generator.generate(slots)
    chat = generator.chat
    assert [guess_of(request) for asked in sampler.asked for request in asked] == [[]] * 4
    assert [request.corpora for request in sampler.asked[0]] == [(slot.example.response_ids,) for slot in slots]
    generator.generate(slots, earlier={record.example_id: record for record in first})
    texts = [*script[0], *script[1]]
    whole = [ids_of(chat, text.removesuffix("…")) + [chat.turn_end_id] * (not text.endswith("…")) for text in texts]
    again = [*sampler.asked[2], *sampler.asked[3]]
    assert [guess_of(request) for request in again] == (whole if same_noise else [[]] * 4)
    golds = [slot.example.response_ids for slot in slots] * 2
    assert [request.corpora for request in again] == list(zip(whole, golds, strict=True))
    for one, two in zip(sampler.asked[0], sampler.asked[2], strict=True):
        assert (one.prompt_ids, one.coins, one.key, one.stop_ids) == (two.prompt_ids, two.coins, two.key, two.stop_ids)


def test_a_guess_longer_than_the_budget_is_cut():
    request = free_request([1], 2, 5, frozenset(), guess_ids=[7, 8, 9])
    assert (request.guess_ids, request.guess_length) == ([7, 8], 2)
    request = free_request([1], 3, 5, frozenset(), guess_ids=[7])
    assert (request.guess_ids, request.guess_length) == ([7, 0, 0], 1)


@pytest.mark.parametrize("noise", ["fresh", "common"])
def test_contexts_guess_the_visit_before_where_both_have_a_coin(noise):
    generator, slots, sampler = make([["x"], ["x"]], noise=noise)
    generator.recipe.method.name = "bss"
    slot = Slot(0, slots[0].example, 1, mix_rate=0.6)
    gold = slot.example.response_ids
    mixed = [token + 1 for token in gold]  # before, every position had a coin
    before = Generated(0, "id-0", 0, 0.3, gold, mixed=Mixed([True] * len(gold), mixed, 1))
    generator.generate([slot], earlier={"id-0": before})
    (request,) = sampler.asked[0]
    coins = draw_coins(len(gold), 0.6, generator._key(slot, Stream.BSS))
    assert request.coins == coins
    assert {True, False} == set(coins[:-1])
    expected = [m if coin else g for m, g, coin in zip(mixed, gold, coins, strict=True)]
    assert request.guess_ids == (expected if noise == "common" else gold)
    assert generator.uses_earlier == (noise == "common")


def test_another_example_of_the_same_id_is_no_guess():
    generator, slots, sampler = make([["red", "blue"]], noise="common")
    other = Generated(0, "id-0", 0, 0.0, [*slots[0].example.response_ids, 5], draft=Draft([9], 2, 1))
    generator.generate(slots, earlier={"id-0": other})
    assert sampler.asked[0][0].corpora == (slots[0].example.response_ids,)
    assert guess_of(sampler.asked[0][0]) == []

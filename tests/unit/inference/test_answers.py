"""The turns of an answer, without a model."""

import pytest

from ssgen_ds.data.records import Record
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.inference.answers import AnswerSettings, answer
from ssgen_ds.recipe.schema import DataConfig
from ssgen_ds.sampler.block import GREEDY_CORRECTIONS, BlockChooser, LookupRates
from ssgen_ds.sampler.call_cost import CallCost
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.free import free_request
from tests.support.alone import alone
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.unit.selfgen.test_rounds import ScriptedSampler, text_of


@pytest.fixture
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), DataConfig(train=["-"]))


def examples(chat: ChatFormat, *prompts: str):
    messages = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "gold"}] for prompt in prompts]
    return [chat.encode(Record(f"row-{i}", one, "", "")) for i, one in enumerate(messages)]


def test_an_answer_that_no_longer_changes_is_not_corrected_again(chat: ChatFormat) -> None:
    """The first stays as it is after one correction; the second changes twice; the third changes, then stays."""
    sampler = ScriptedSampler(chat, [["a", "b", "c…"], ["a", "bb", "cc"], ["bbb", "cc"], ["b4"]])
    given = answer(
        AnswerSettings(8, correct=3), BlockChooser(1, sampler, 96), chat, examples(chat, "p", "q", "r"), "fix"
    )
    assert [[text_of(chat, ids) for ids in one.turns] for one in given] == [
        ["a", "a"],
        ["b", "bb", "bbb", "b4"],
        ["c", "cc", "cc"],
    ]
    assert [len(asked) for asked in sampler.asked] == [3, 3, 2, 1]
    assert given[2].stopped == [False, True, True] and given[2].num_tokens == [1, 3, 3]


def test_each_correction_shows_the_latest_answer_and_the_cue(chat: ChatFormat) -> None:
    sampler = ScriptedSampler(chat, [["one"], ["two"], ["three"]])
    answer(AnswerSettings(8, correct=2), BlockChooser(1, sampler, 96), chat, examples(chat, "p"), "fix")
    shown = [text_of(chat, asked[0].prompt_ids) for asked in sampler.asked]
    assert [text.replace("\n", "~") for text in shown] == ["p~~", "p~~one~~fix~~", "p~~two~~fix~~"]


def test_every_answer_and_turn_has_noise_of_its_own(chat: ChatFormat) -> None:
    def keys(*prompts: str) -> list[list[int]]:
        script = [["a", "b"] * len(prompts), ["c", "d"] * len(prompts)]
        sampler = ScriptedSampler(chat, script)
        settings = AnswerSettings(8, temperature=1.0, correct=1, samples=2)
        answer(settings, BlockChooser(1, sampler, 96), chat, examples(chat, *prompts), "fix")
        return [[request.key for request in asked] for asked in sampler.asked]

    two = keys("p", "q")
    assert len({key for turn in two for key in turn}) == 8
    assert keys("p") == [turn[:2] for turn in two], "whatever else is answered"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_look_ups_change_the_number_of_calls_and_nothing_else(chat: ChatFormat, temperature: float) -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    sampler = EngineSampler(model, alone(), BatchLimit(rows=4))
    settings = AnswerSettings(48, temperature=temperature, correct=2)
    found, costs = [], []
    for block in (1, 4, 16, "all"):
        calls.clear()
        found.append(answer(settings, BlockChooser(block, sampler, 96), chat, examples(chat, "abc abc", "xyz"), "fix"))
        costs.append(len(calls))
    assert all(answers == found[0] for answers in found)
    assert max(costs[1:]) < costs[0], costs


def test_few_answers_are_not_worth_a_measurement(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    cost = CallCost((8, 32, 128, 256), (1.0, 1.0, 1.0, 1.0), 0.0)  # a wide call costs what a narrow one does
    monkeypatch.setattr("ssgen_ds.sampler.block.measure_call_cost", lambda *_: measured.append(1) or cost)
    blocks = BlockChooser("auto", EngineSampler(tiny_model("llama"), alone(), BatchLimit(rows=4)), 96)
    requests = [free_request([1, 2], 49, key, frozenset()) for key in range(5)]
    assert blocks.answering(requests[:4], GREEDY_CORRECTIONS) == 1 and not measured
    assert blocks.answering(requests, GREEDY_CORRECTIONS) == 32 and len(measured) == 1
    assert blocks.answering(requests, LookupRates(0.0, 0.5)) == 1

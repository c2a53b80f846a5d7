"""Turns of an answer, and the journal that keeps answers, without a model."""

import json
from pathlib import Path

import pytest
import torch

from ssgen_ds.config import DataConfig
from ssgen_ds.data.records import Record
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.distributed import World
from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.answers import AnswerSettings, answer
from ssgen_ds.evaluate.journal import Journal
from tests.support.tiny_models import tiny_tokenizer
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
    given = answer(AnswerSettings(8, correct=3), sampler, chat, examples(chat, "p", "q", "r"), "fix", 96)
    assert [[text_of(chat, ids) for ids in one.turns] for one in given] == [
        ["a", "a"],
        ["b", "bb", "bbb", "b4"],
        ["c", "cc", "cc"],
    ]
    assert [len(asked) for asked in sampler.asked] == [3, 3, 2, 1]
    assert given[2].stopped == [False, True, True] and given[2].num_tokens == [1, 3, 3]


def test_each_correction_shows_the_latest_answer_and_the_cue(chat: ChatFormat) -> None:
    sampler = ScriptedSampler(chat, [["one"], ["two"], ["three"]])
    answer(AnswerSettings(8, correct=2), sampler, chat, examples(chat, "p"), "fix", 96)
    shown = [text_of(chat, asked[0].prompt_ids) for asked in sampler.asked]
    assert [text.replace("\n", "~") for text in shown] == ["p~~", "p~~one~~fix~~", "p~~two~~fix~~"]


def test_every_answer_and_turn_has_noise_of_its_own(chat: ChatFormat) -> None:
    def keys(*prompts: str) -> list[list[int]]:
        script = [["a", "b"] * len(prompts), ["c", "d"] * len(prompts)]
        sampler = ScriptedSampler(chat, script)
        settings = AnswerSettings(8, temperature=1.0, correct=1, samples=2)
        answer(settings, sampler, chat, examples(chat, *prompts), "fix", 96)
        return [[request.key for request in asked] for asked in sampler.asked]

    two = keys("p", "q")
    assert len({key for turn in two for key in turn}) == 8
    assert keys("p") == [turn[:2] for turn in two], "whatever else is answered"


# -- the journal -------------------------------------------------------------------------------------------------------


class Alone(World):
    """One rank without a process group."""

    def together(self, work):
        return work()

    def broadcast(self, item):
        return item


def journal(folder: Path, identity: str = "a", group: int = 1) -> Journal:
    alone = Alone(0, 0, 1, torch.device("cpu"), control=None)
    return Journal(folder / "scores.json", {"model": identity}, alone, group)


def test_answers_are_there_after_a_kill_but_for_the_line_that_was_cut(tmp_path: Path, capsys) -> None:
    with journal(tmp_path) as first:
        first.append([{"index": 0, "text": "a\u2028b"}])
        first.append([{"index": 1}])
    with open(first.file, "a", encoding="utf-8") as stream:
        stream.write('{"index": 2, "te')
    with journal(tmp_path) as second:
        assert second.rows() == [{"index": 0, "text": "a\u2028b"}, {"index": 1}] and second.num_rows == 2
        second.append([{"index": 2}])
        assert [row["index"] for row in second.rows()] == [0, 1, 2]
    assert "going on after 2 answers" in capsys.readouterr().err
    second.close_for_good()
    assert list(tmp_path.iterdir()) == []


def test_an_example_whose_answers_were_cut_is_answered_again(tmp_path: Path) -> None:
    """Two answers an example: the second of the second is missing, cut inside of a character."""
    with journal(tmp_path) as first:
        first.append([{"index": 0, "sample": 0}, {"index": 0, "sample": 1}])
        first.append([{"index": 1, "sample": 0}])
    with open(first.file, "ab") as stream:
        stream.write('{"index": 1, "text": "\u00e9'.encode()[:-1])
    with journal(tmp_path, group=2) as second:
        assert second.rows() == [{"index": 0, "sample": 0}, {"index": 0, "sample": 1}]


def test_answers_of_another_evaluation_are_not_mixed_in(tmp_path: Path, capsys) -> None:
    with journal(tmp_path) as first:
        first.append([{"index": 0}])
    with journal(tmp_path, "b") as second:
        assert second.rows() == []
    assert "starting over" in capsys.readouterr().err
    assert json.loads(second.file.read_text().splitlines()[0]) == {"model": "b"}


def test_of_two_processes_that_write_one_result_the_first_ends(tmp_path: Path) -> None:
    """The second has put a file of its own in place: what the first wrote from then on would be missing, unnoticed."""
    with journal(tmp_path) as first:
        first.append([{"index": 0}])
        with journal(tmp_path) as second:
            second.append([{"index": 1}])
            with pytest.raises(UserError, match="another process has begun the same evaluation"):
                first.append([{"index": 1}])
            assert [row["index"] for row in second.rows()] == [0, 1]
            second.close_for_good()
        with pytest.raises(UserError, match="another process has begun"):
            first.check_owner()

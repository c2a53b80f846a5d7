"""The journal that keeps answers until the evaluation is finished."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.evaluate import _identity
from ssgen_ds.evaluate.journal import Journal
from ssgen_ds.inference.answers import AnswerSettings
from ssgen_ds.inference.model_source import ModelSource
from ssgen_ds.inference.session import InferenceSettings
from ssgen_ds.recipe.schema import ModelConfig
from ssgen_ds.run.layout import journal_file
from tests.support.alone import alone


def journal(folder: Path, identity: str = "a", group: int = 1) -> Journal:
    return Journal(folder / "scores.json", {"model": identity, "limit": None}, alone(), group)


def line(index: int, sample: int = 0, prediction: str = "a\u2028b") -> dict[str, object]:
    """Of a predictions file."""
    return {
        "index": index, "id": f"row-{index}", "sample": sample, "prompt": "p", "references": [], "stopped": True,
        "prediction": prediction, "turns": [prediction], "num_tokens": 1, "reference_tokens": 0, "scores": {},
        "first_scores": {},
    }  # fmt: skip


def test_answers_are_there_after_a_kill_but_for_the_line_that_was_cut(tmp_path: Path, capsys) -> None:
    with journal(tmp_path) as first:
        first.append([line(0)])
        first.append([line(1)])
    with open(first.file, "a", encoding="utf-8") as stream:
        stream.write('{"index": 2, "te')
    with journal(tmp_path) as second:
        assert second.rows() == [line(0), line(1)] and second.num_rows == 2
        second.append([line(2)])
        assert [row["index"] for row in second.rows()] == [0, 1, 2]
    assert "going on after 2 answers" in capsys.readouterr().err
    second.close_for_good()
    assert list(tmp_path.iterdir()) == []


def test_an_example_whose_answers_were_cut_is_answered_again(tmp_path: Path) -> None:
    """Two answers an example: the second of the second is missing, cut inside of a character."""
    with journal(tmp_path, group=2) as first:
        first.append([line(0), line(0, 1)])
        first.append([line(1)])
    with open(first.file, "ab") as stream:
        stream.write('{"index": 1, "text": "\u00e9'.encode()[:-1])
    with journal(tmp_path, group=2) as second:
        assert second.rows() == [line(0), line(0, 1)]


@pytest.mark.parametrize(
    "damaged",
    [
        b"\0" * 512, b"\0\0" + json.dumps(line(1)).encode(), b"[1, 2]", b"7", b'{"index": 1}', b"[" * 100_000,
        json.dumps(line(0)).encode(), json.dumps(line(2)).encode(), json.dumps(line(1, 1)).encode(),
        json.dumps(line(1) | {"scores": {"em": "1"}}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_answer_in_its_place_is_made_again(tmp_path: Path, damaged: bytes) -> None:
    with journal(tmp_path) as first:
        first.append([line(0)])
    with open(first.file, "ab") as stream:
        stream.write(damaged + b"\n" + json.dumps(line(2)).encode() + b"\n")
    with journal(tmp_path) as second:
        assert second.rows() == [line(0)]
        second.append([line(1)])
        assert second.rows() == [line(0), line(1)]


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[]\n", b"\xff{\n", b'{"model": "a"'])
def test_a_journal_that_does_not_say_of_what_is_begun_again(tmp_path: Path, content: bytes) -> None:
    file = journal_file(tmp_path / "scores.json")
    file.write_bytes(content)
    with journal(tmp_path) as begun:
        assert begun.rows() == []
    assert json.loads(file.read_text()) == {"model": "a", "limit": None}


def test_a_full_disk_keeps_the_answers_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(tmp_path) as first:
        first.append([line(0)])
        kept = first.file.read_bytes()

        class Full:
            """Takes half of what it is given, then nothing."""

            def __init__(self, stream) -> None:
                self._stream, self._taken = stream, False

            def write(self, data: bytes) -> int:
                if self._taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._taken = True
                return self._stream.write(data[: len(data) // 2])

            def __getattr__(self, name: str):
                return getattr(self._stream, name)

        monkeypatch.setattr(first, "_stream", Full(first._stream))
        with pytest.raises(OSError, match="No space left"):
            first.append([line(1)])
        assert first.file.read_bytes() == kept


def test_answers_of_another_evaluation_are_not_mixed_in(tmp_path: Path, capsys) -> None:
    with journal(tmp_path) as first:
        first.append([line(0)])
    with journal(tmp_path, "b") as second:
        assert second.rows() == []
    assert "starting over" in capsys.readouterr().err
    assert json.loads(second.file.read_text().splitlines()[0]) == {"model": "b", "limit": None}


def test_of_two_processes_that_write_one_result_the_first_ends(tmp_path: Path) -> None:
    """The second has put a file of its own in place: what the first wrote from then on would be missing, unnoticed."""
    with journal(tmp_path) as first:
        first.append([line(0)])
        with journal(tmp_path) as second:
            second.append([line(1)])
            with pytest.raises(UserError, match="another process has begun the same evaluation"):
                first.append([line(1)])
            assert [row["index"] for row in second.rows()] == [0, 1]
            second.close_for_good()
        with pytest.raises(UserError, match="another process has begun"):
            first.check_owner()


def test_a_journal_of_an_earlier_version_continues(tmp_path: Path) -> None:
    """Its identity has the same keys. Their order counts for nothing."""
    with journal(tmp_path) as first:
        first.append([line(0)])
    identity, *rest = first.file.read_text("utf-8").split("\n")
    other_order = json.dumps(dict(reversed(json.loads(identity).items())))
    assert other_order != identity
    first.file.write_text("\n".join([other_order, *rest]), encoding="utf-8")
    with journal(tmp_path) as second:
        assert second.rows() == [line(0)]
    inference = SimpleNamespace(
        settings=InferenceSettings("m", "d.jsonl", reference_column="gold"), prompts_fingerprint="p",
        model_source=ModelSource(ModelConfig(path="base")), chat=SimpleNamespace(fingerprint=lambda: "tokenizer"),
        examples=[1, 2], cue="again",
    )  # fmt: skip
    found = _identity(inference, AnswerSettings(), SimpleNamespace(names=["em"]))
    assert found["where"] == {
        "model": "m", "data": "d.jsonl", "prompt": None, "limit": None, "batch": "auto", "deepspeed": None,
        "reference": "gold", "max_prompt_tokens": None,
    }  # fmt: skip
    assert found["how"] == {
        "max_new_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "correct": 0, "samples": 1,
    }  # fmt: skip
    assert found["how"] == asdict(AnswerSettings())

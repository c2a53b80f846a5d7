"""Texts side by side: what the run trained on and what its model answers. Rules choose them; changes are marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ssgen_ds.report.read_run import Evaluation, Run
from ssgen_ds.report.scores import base_of, main_evaluation, metric_title, number, primary_metric

EXAMPLES_PER_ROUND = 3
ANSWERS_PER_GROUP = 2
LONGEST_DIFF = 3000  # words; longer texts are shown without marks
_SHORTEST_FRAME = 12  # characters
# Words, single characters of scripts without spaces, blanks, punctuation.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\s+|[^\w\s]"
)

Pieces = list[tuple[str, bool]]  # pieces of a text, and whether each is marked


@dataclass(frozen=True)
class Frame:
    """The text around every prompt: the chat template and the instruction."""

    before: str = ""
    after: str = ""

    def strip(self, prompt: str) -> str:
        inner = prompt.removeprefix(self.before).removesuffix(self.after)
        return inner.strip("\n") or prompt


@dataclass(frozen=True)
class Text:
    """One text of a card; `kind` is its colour: gold, self, base or plain."""

    title: str
    pieces: Pieces
    kind: str = "plain"
    note: str = ""
    mark: str = "mark"  # the element around marked pieces


@dataclass(frozen=True)
class Card:
    """One example: its prompt, and its texts side by side."""

    label: str
    prompt: str
    texts: list[Text]


@dataclass(frozen=True)
class CardGroups:
    """Cards under a heading, and the frame that their prompts are shown without."""

    groups: list[tuple[str, list[Card]]] = field(default_factory=list)
    frame: Frame = Frame()
    metric: str = ""  # the metric that chose the answers
    name: str = ""  # of the evaluation


def common_frame(prompts: Iterable[str]) -> Frame:
    """The whole lines that all prompts begin and end with. A single prompt has no frame."""
    distinct = sorted(set(prompts))
    if len(distinct) < 2:
        return Frame()
    first, last = distinct[0], distinct[-1]
    before = first[: _alike(first, last)]
    before = before[: before.rfind("\n") + 1]
    endings = sorted(prompt[len(before) :][::-1] for prompt in distinct)
    after = endings[0][: _alike(endings[0], endings[-1])][::-1]
    after = re.sub(r"^\w+", "", after) if after[:1].isalnum() else after  # not half a word
    return Frame(*(text if len(text) >= _SHORTEST_FRAME else "" for text in (before, after)))


def _alike(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common. The ends of a sorted list give it for all."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def changed_words(before: str, after: str) -> tuple[Pieces, Pieces]:
    """Both texts as pieces. Words that the other text does not have at this place are marked."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(old), len(new)) > LONGEST_DIFF:
        return [(before, False)], [(after, False)]
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    last = len(opcodes) - 1
    is_changed = [
        kind != "equal" or (0 < index < last and "".join(old[begin:end]).isspace())  # a blank between two changes
        for index, (kind, begin, end, _, _) in enumerate(opcodes)
    ]
    old_pieces: Pieces = []
    new_pieces: Pieces = []
    for is_marked, (_, old_from, old_to, new_from, new_to) in zip(is_changed, opcodes, strict=True):
        _append(old_pieces, "".join(old[old_from:old_to]), is_marked)
        _append(new_pieces, "".join(new[new_from:new_to]), is_marked)
    return old_pieces, new_pieces


def _append(pieces: Pieces, text: str, is_marked: bool) -> None:
    """Add a piece, or extend the last one if it has the same mark."""
    if pieces and pieces[-1][1] == is_marked:
        text = pieces.pop()[0] + text
    if text:
        pieces.append((text, is_marked))


def kept_draft(sample: dict[str, Any]) -> str:
    """The part of the draft that the correction starts from: the whole draft if nothing was cut."""
    return sample["draft"] or "" if sample["draft_kept"] is None else sample["draft_kept"]


# -- what it trained on ------------------------------------------------------------------------------------------------


def training_texts(samples: list[dict[str, Any]]) -> CardGroups:
    """A few samples of the first and of the last round."""
    frame = common_frame(sample["prompt"] for sample in samples)
    numbers = sorted({sample["round"] for sample in samples})
    groups = []
    for round_number in numbers[:1] + numbers[1:][-1:]:
        shown = [sample for sample in samples if sample["round"] == round_number][:EXAMPLES_PER_ROUND]
        groups.append((f"Round {round_number}", [_training_card(sample, frame) for sample in shown]))
    return CardGroups(groups, frame)


def _training_card(sample: dict[str, Any], frame: Frame) -> Card:
    texts = [Text("Gold", [(sample["gold"], False)], "gold")]
    if sample["mixed"] is not None:
        texts.append(Text("Mixed context", [(text, is_sampled) for text, is_sampled in sample["mixed"]], "self"))
    if sample["draft"] is not None:
        kept = kept_draft(sample)
        cut = sample["draft"].removeprefix(kept)
        pieces = [(kept, False)] * bool(kept) + [(cut, True)] * bool(cut) or [("(empty)", False)]
        texts.append(Text("Draft", pieces, "self", "cut text struck out" if cut else "", mark="del"))
    if sample["correction_target"] is not None:
        is_gold = sample["target_kind"] == "reference"
        note = "the reference" if is_gold else "the model's rewrite"
        texts.append(Text("Correction", [(sample["correction_target"], False)], "gold" if is_gold else "self", note))
    return Card(f"{sample['example_id']} · step {sample['step']}", frame.strip(sample["prompt"]), texts)


# -- what it answers ---------------------------------------------------------------------------------------------------


def answer_texts(run: Run) -> CardGroups:
    """Answers of the run's main evaluation: those that correcting changed most, the best and the worst."""
    evaluation = main_evaluation(run)
    if evaluation is None or not evaluation.predictions:
        return CardGroups()
    metric = primary_metric(run, evaluation)
    base = base_of(run, evaluation)
    before = {} if base is None else {_answered(row): row for row in base.predictions}
    frame = common_frame(row["prompt"] for row in evaluation.predictions)
    groups = [
        (title, [_answer_card(row, before.get(_answered(row)), metric, frame) for row in rows])
        for title, rows in choose_answers(evaluation, metric)
    ]
    return CardGroups(groups, frame, "" if metric is None else metric_title(metric), evaluation.name)


def _answered(row: dict[str, Any]) -> tuple[int, str, int]:
    """The example and the answer's number: an id may occur several times."""
    return row["index"], row["id"], row["sample"]


def choose_answers(evaluation: Evaluation, metric: str | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, rows). No answer appears twice. Equal scores keep the file's order. No metric: the first answers."""
    rows = evaluation.predictions
    if metric is None:
        return [("The first answers", rows[:ANSWERS_PER_GROUP])]
    ranked = sorted(rows, key=lambda row: row["scores"][metric])
    gains = sorted(rows, key=lambda row: row["scores"][metric] - row["first_scores"][metric])
    gained = [row for row in reversed(gains) if row["scores"][metric] > row["first_scores"][metric]]
    lost = [row for row in gains if row["scores"][metric] < row["first_scores"][metric]]
    groups = (
        ("Better for being corrected", gained),
        ("Worse for being corrected", lost),
        ("The best answers", ranked[::-1]),
        ("The worst answers", ranked),
    )
    chosen, taken = [], set()
    for title, candidates in groups:
        some = [row for row in candidates if id(row) not in taken][:ANSWERS_PER_GROUP]
        taken |= {id(row) for row in some}
        if some:
            chosen.append((title, some))
    return chosen


def _answer_card(row: dict[str, Any], before: dict[str, Any] | None, metric: str | None, frame: Frame) -> Card:
    texts = [Text("Reference", [(gold_text, False)], "gold") for gold_text in row["references"][:1]]
    if before is not None:
        texts.append(Text("Before training", _shown(before["prediction"]), "base", _note(before, "scores", metric)))
    first, last = row["turns"][0], row["turns"][-1]
    if len(row["turns"]) == 1:
        texts.append(Text("Answer", _shown(last), "self", _note(row, "scores", metric)))
    else:
        old, new = changed_words(first, last)
        unchanged = "unchanged, " if first == last else ""
        texts.append(Text("First answer", old or _shown(""), "self", _note(row, "first_scores", metric), mark="del"))
        texts.append(Text("Corrected", new or _shown(""), "self", unchanged + _note(row, "scores", metric), mark="ins"))
    return Card(str(row["id"]), frame.strip(row["prompt"]), texts)


def _note(row: dict[str, Any], key: str, metric: str | None) -> str:
    parts = [] if metric is None else [number(row[key][metric])]
    if key == "scores" and not row["stopped"]:
        parts.append("ran out of tokens")
    return ", ".join(parts)


def _shown(text: str) -> Pieces:
    return [(text if text.strip() else "(empty)", False)]

"""Read what a run has written, or refuse it in one sentence that names the file and the fix.

NUL bytes at the end of a file, which a power cut may leave, and a last line without its end count as not written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ssgen_ds.errors import UserError

TEXT_COLUMNS = ("selfgen_strategy", "selfgen_block")  # of metrics.jsonl; all others are numbers or null
Number = float | None
LINE_FIX = "repair or delete this line"


class Shape(BaseModel):
    """The keys that a reader relies on. More keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StepRow(Shape):
    """A line of metrics.jsonl."""

    step: int
    round: int = 1
    loss: Number = None
    grad_norm: Number = None
    num_tokens: int = 0

    @model_validator(mode="after")
    def _numbers(self) -> StepRow:
        for key, value in (self.model_extra or {}).items():
            if key not in TEXT_COLUMNS and not (value is None or isinstance(value, int | float)):
                raise ValueError(f"{key} is no number")
        return self


class WholeStepRow(StepRow):
    """A line of metrics.jsonl that the report can draw."""

    round: int
    loss: Number
    grad_norm: Number
    num_tokens: int


class AttemptRow(Shape):
    """A line of attempts.jsonl: a start, the step that it goes on from, or how it ended."""

    recipe: str = ""
    job: str | None = ""
    step: int | None = None
    outcome: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _pairs(self) -> AttemptRow:
        given = self.model_fields_set
        if ("recipe" in given) != ("job" in given) or ("outcome" in given) != ("reason" in given):
            raise ValueError("it has half of what belongs together")
        return self


class SampleRow(Shape):
    """A line of selfgen/samples.jsonl."""

    round: int
    step: int
    example_id: str
    prompt: str
    gold: str
    mixed: list[list[str | bool]] | None
    draft: str | None
    draft_kept: str | None
    correction_target: str | None
    target_kind: str | None


class Best(Shape):
    """checkpoints/best.json."""

    step: int
    metric: str
    value: float


class Interval(Shape):
    mean: float
    low: float
    high: float


class Change(Interval):
    p_value: float


class Correction(Shape):
    first: dict[str, Interval]
    change: dict[str, Change]
    improved: dict[str, int]
    worsened: dict[str, int]
    wrong_to_right: dict[str, int]
    right_to_wrong: dict[str, int]
    unchanged_share: float


class Decoding(Shape):
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    correct: int
    samples: int = 1
    seed: int = 0


class Behaviour(Shape):
    eos_rate: float
    length_ratio: Number
    repetition: float
    empty_rate: float
    mean_tokens: float


class EvaluationFile(Shape):
    """A file of evaluations/ with kind `evaluation`."""

    kind: str
    model: str
    data: str
    step: int | None
    num_examples: int
    settings: Decoding
    scores: dict[str, Interval]
    behaviour: dict[str, Number]
    correction: Correction | None
    predictions: str
    model_step: int | None = None

    @model_validator(mode="after")
    def _whole(self) -> EvaluationFile:
        if self.behaviour:
            Behaviour.model_validate(self.behaviour)
        if self.predictions in ("", ".", "..") or Path(self.predictions).name != self.predictions:
            raise ValueError("predictions is no name of a file beside it")
        return self

    @property
    def num_predictions(self) -> int:
        """The number of prediction lines; 0 where training only measured the loss."""
        return self.num_examples * self.settings.samples if self.behaviour else 0


class PredictionRow(Shape):
    """A line of an evaluation's predictions."""

    index: int
    id: str
    sample: int
    prompt: str
    references: list[str]
    prediction: str
    turns: list[str]
    stopped: bool
    num_tokens: int
    reference_tokens: int
    scores: dict[str, float]
    first_scores: dict[str, float]

    @model_validator(mode="after")
    def _answered(self) -> PredictionRow:
        if not self.turns:
            raise ValueError("turns is empty")
        return self


class Compared(Shape):
    model: str


class ComparisonFile(Shape):
    """A file of evaluations/ that `ssgen compare --json` printed."""

    before: Compared
    after: Compared
    difference: dict[str, Change]


class GapFile(Shape):
    """gap/gap.json."""

    models: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    num_examples: int
    data: str


def read_rows(path: Path, shape: type[Shape] | None = None, fix: str = LINE_FIX) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; see `each_row`."""
    return list(each_row(path, shape, fix))


def each_row(path: Path, shape: type[Shape] | None = None, fix: str = LINE_FIX) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. A torn last line, left by a kill or a write under way, is not a row.

    Raises:
        UserError: it cannot be read, or a line is not a JSON object of this shape.
    """
    no_row = 0
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.strip(b"\0\r\n ")
                if not line:
                    continue
                if no_row:
                    raise UserError(f"{path}:{no_row}: not a JSON object; {fix}")
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # covers both broken JSON and a character cut in half
                    row = None
                if not isinstance(row, dict):
                    no_row = number
                    continue
                if shape is not None and (problem := problem_of(row, shape)):
                    raise UserError(f"{path}:{number}: damaged: {problem}; {fix}")
                yield row
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_mapping(path: Path, fix: str, shape: type[Shape] | None = None) -> dict[str, Any]:
    """The object of a JSON or YAML file. Raises UserError when it cannot be read, or has another shape."""
    try:
        text = _content(path).decode("utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}; {fix}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: expected a mapping, got {type(content).__name__}; {fix}")
    if shape is not None and (problem := problem_of(content, shape)):
        raise UserError(f"{path}: damaged: {problem}; {fix}")
    return content


def problem_of(content: dict[str, Any], shape: type[Shape]) -> str:
    """What is missing or of another type; "" when it has this shape."""
    try:
        shape.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    return ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().rstrip(b"\0")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

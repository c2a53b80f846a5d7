"""What `--metrics` may name, and what it becomes."""

from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.metrics.scorer import Scorer, metric_names
from ssgen_ds.metrics.text import exact_match, f1, math_equal, rouge


def test_groups_are_spelt_out_and_nothing_is_named_twice() -> None:
    names = ["rouge1", "rouge2", "rougeL", "exact_match", "f1", "math"]
    assert metric_names(["rouge", "em", "squad", "math", "rougeL"]) == names
    assert metric_names([]) == []


def test_a_misspelt_metric_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"eval\.metrics: unknown metric 'roughe'; did you mean rouge\?"):
        metric_names(["roughe"], "eval.metrics")


def test_scores_are_those_of_the_metrics() -> None:
    answer, gold_texts = "The cat sat on 9 mats", ["a cat sat on mats", "9"]
    assert Scorer(["rouge", "em", "f1", "math"])(answer, gold_texts) == {
        **rouge(answer, gold_texts),
        "exact_match": exact_match(answer, gold_texts),
        "f1": f1(answer, gold_texts),
        "math": math_equal(answer, gold_texts),
    }


def test_an_empty_answer_scores_0() -> None:
    assert set(Scorer(["rouge", "squad", "math"])("", ["something"]).values()) == {0.0}


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics_of_the_test.py").write_text(
        "def words(prediction, gold_texts):\n    return len(prediction.split()) / len(gold_texts)\n"
        "def nothing(prediction, gold_texts):\n    return None\n"
        "def infinite(prediction, gold_texts):\n    return float('inf')\n"
        "def failing(prediction, gold_texts):\n    return 1 / 0\n"
        "number = 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)


def test_a_metric_of_ones_own_from_the_working_directory(own_metrics: None) -> None:
    name = "own_metrics_of_the_test:words"
    assert Scorer([name, "em"])("two words", ("a", "b")) == {name: 1.0, "exact_match": 0.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("own_metrics_of_the_test:missing", "has no function 'missing'"),
        ("own_metrics_of_the_test:number", "has no function 'number'"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_at_once(own_metrics: None, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scorer([name])


@pytest.mark.parametrize("function", ["nothing", "infinite"])
def test_a_metric_that_returns_no_number_is_named(own_metrics: None, function: str) -> None:
    scorer = Scorer([f"own_metrics_of_the_test:{function}"])
    with pytest.raises(UserError, match=f"own_metrics_of_the_test:{function}: must return a finite number"):
        scorer("a", ["b"])


def test_a_metric_that_fails_is_named_with_the_answer(own_metrics: None) -> None:
    with pytest.raises(UserError, match="own_metrics_of_the_test:failing: failed on the answer 'a': ZeroDivisionError"):
        Scorer(["own_metrics_of_the_test:failing"])("a", ["b"])

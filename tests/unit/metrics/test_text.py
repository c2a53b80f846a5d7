from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssgen_ds.errors import UserError
from ssgen_ds.metrics.text import exact_match, f1, math_equal, normalize, rouge, score_text

NAMES = ("rougeL", "f1", "exact_match", "math")


def test_rouge_of_the_rouge_score_readme_pair() -> None:
    """9 reference and 8 predicted stems. In common: the (2), quick, brown, jump, dog = 6; bigrams: "the quick" and
    "quick brown" = 2 of 8 and 7; longest common subsequence: the quick brown jump the = 5."""
    result = rouge("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert result == pytest.approx({"rouge1": 12 / 17, "rouge2": 4 / 15, "rougeL": 10 / 17})


def test_rouge_of_the_rouge_score_unit_test() -> None:
    """rouge_scorer_test.py: target "testing one two", prediction "testing": precision 1, recall 1/3."""
    assert rouge("testing", "testing one two")["rouge1"] == pytest.approx(0.5)


def test_rouge_takes_the_best_gold_answer_for_each_variant() -> None:
    assert rouge("a b c", ["x y z", "a b c"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_rouge_stems() -> None:
    assert rouge("he was running", "he was runs")["rougeL"] == 1.0


def test_rouge_reads_other_scripts() -> None:
    """4 characters each, 3 in common in order."""
    assert rouge("模型很好", "模型不好")["rougeL"] == pytest.approx(0.75)
    assert rouge("привет мир", "привет, мир!")["rouge2"] == 1.0


def test_squad_normalisation() -> None:
    assert normalize("The  Cat's, a hat -- an END.") == "cats hat end"


def test_squad_f1_by_hand() -> None:
    """Predicted {cat, sat, on, mat}, gold {cat, sat, down}: 2 in common, 2 * 2 / (4 + 3)."""
    assert f1("The cat sat on the mat", "the cat sat down") == pytest.approx(4 / 7)
    assert f1("the cat sat on the mat", ["dogs", "a cat sat on a mat!"]) == 1.0


def test_f1_counts_repeated_words_once_each() -> None:
    assert f1("yes yes yes", "yes") == pytest.approx(0.5)


def test_exact_match() -> None:
    assert exact_match("The Beatles.", "beatles") == 1.0
    assert exact_match("Beatles fan", "beatles") == 0.0
    assert exact_match("nine", ["9", "Nine"]) == 1.0


def test_options_that_normalise_to_nothing_are_told_apart() -> None:
    assert exact_match("A", "A") == f1("a", "A") == 1.0
    assert exact_match("A", "The") == f1("A", "The") == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold_text"),
    [
        ("9 apples", "The answer is 9."),
        ("The answer is 9.", "9 apples"),
        ("7 + 2 = 9, so there are 9 apples in the basket", "9 apples"),
        ("He sold 48/2 = <<48/2=24>>24 in May, 72 in all.\n#### 72", "72"),
        ("Half of that is $\\boxed{5}$.\n#### 72", "72"),  # what follows #### counts, boxes or not
        ("$1,234.50", "1234.5"),
        ("\\boxed{\\frac{18}{2}}", "9"),
        ("0.5", "$\\frac{1}{2}$"),
        ("50%", "0.5"),
        ("$x^2+2x+1$", "$(x+1)^2$"),
        ("$\\{1,2\\}$", "$\\{2,1\\}$"),  # the set example of math-verify's README
    ],
)
def test_equal_maths(prediction: str, gold_text: str) -> None:
    assert math_equal(prediction, gold_text) == 1.0


@pytest.mark.parametrize(
    ("prediction", "gold_text"),
    [("10 apples", "9 apples"), ("nine", "9"), ("-9", "9"), ("9, or rather 8", "9"), ("90", "9")],
)
def test_unequal_maths(prediction: str, gold_text: str) -> None:
    assert math_equal(prediction, gold_text) == 0.0


@pytest.mark.parametrize(
    "monster",
    ["$9^{9^{9^9}}$", "$2^{99999999999}$", "$100000000!$", "$((10^{1000})^{1000})^{1000}$", "$e^{e^{e^{e^9}}}$"],
)
def test_answers_that_never_finish_evaluating_are_refused(monster: str) -> None:
    start = time.monotonic()
    assert math_equal(monster, "9") == 0.0
    assert math_equal(monster, monster) == 1.0
    assert time.monotonic() - start < 20


def test_maths_works_in_a_worker_thread() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(math_equal, ["9 apples", "$\\frac{8}{2}$"], ["9", "4"])) == [1.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_scores_nothing(name: str, empty: str) -> None:
    assert score_text(name, empty, "9 apples") == score_text(name, empty, "") == score_text(name, empty, []) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_score_takes_the_best_gold_answer(name: str) -> None:
    assert score_text(name, "12 apples", "12 apples") == 1.0
    assert score_text(name, "12 apples", ["7 pears", "12 apples"]) == 1.0
    assert score_text(name, "12 apples", ["7 pears"]) == 0.0


def test_score_names_its_metrics() -> None:
    with pytest.raises(UserError, match="'bleu': unknown; choose from rougeL, f1, exact_match, math"):
        score_text("bleu", "a", "b")


WORDS = st.lists(st.sampled_from(["rain", "road", "closed", "9", "é", "好"]), min_size=1, max_size=8).map(" ".join)


@given(WORDS, WORDS)
def test_scores_are_symmetric_bounded_and_one_on_equal_texts(left: str, right: str) -> None:
    for name in ("f1", "exact_match"):
        assert score_text(name, left, right) == score_text(name, right, left)
    for name in ("rougeL", "f1", "exact_match"):
        assert 0.0 <= score_text(name, left, right) <= 1.0
    assert f1(left, left) == exact_match(left, left) == 1.0
    assert exact_match(left, right) <= f1(left, right)

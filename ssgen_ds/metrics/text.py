"""Text metrics: how close an answer is to a gold answer. Pure functions of two strings, each between 0 and 1.

ROUGE is Lin (2004) as in Google's rouge-score; exact match and F1 normalise as the SQuAD script does (Rajpurkar et al.,
2016); maths equality is from Hugging Face's math-verify. The best of several gold answers counts. An empty one gets 0.
"""

from __future__ import annotations

import functools
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ssgen_ds.errors import UserError

GoldTexts = str | Sequence[str]
ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
LARGEST_NUMBER = 1e300  # beyond it, exact arithmetic on an answer such as 9^(9^9) may never end


def score_text(name: str, prediction: str, gold_texts: GoldTexts) -> float:
    """The metric called `name` (rougeL, f1, exact_match, math). Raises UserError for another name."""
    metrics: dict[str, Callable[[str, GoldTexts], float]] = {
        "rougeL": lambda answer, gold: rouge(answer, gold)["rougeL"],
        "f1": f1,
        "exact_match": exact_match,
        "math": math_equal,
    }
    if name not in metrics:
        raise UserError(f"metric {name!r}: unknown; choose from {', '.join(metrics)}")
    return metrics[name](prediction, gold_texts)


def rouge(prediction: str, gold_texts: GoldTexts) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures with Porter stemming, as reported for XSum; the best gold answer for each.

    rouge-score knows the letters a-z and digits only. Where a gold answer is written mostly in other letters, its words
    (single characters where a script has no spaces) are the tokens; English scores stay comparable with published ones.
    """
    best = dict.fromkeys(ROUGE_NAMES, 0.0)
    for gold_text in _as_list(gold_texts):
        scores = _rouge_scorer(_is_ascii_text(gold_text)).score(gold_text, prediction)
        best = {name: max(best[name], float(scores[name].fmeasure)) for name in ROUGE_NAMES}
    return best


def exact_match(prediction: str, gold_texts: GoldTexts) -> float:
    """1.0 where the two agree after lower-casing and dropping punctuation, articles and extra blanks."""
    return float(any(_matches(prediction, gold_text) for gold_text in _as_list(gold_texts)))


def f1(prediction: str, gold_texts: GoldTexts) -> float:
    """Harmonic mean of the precision and recall of the bags of normalised words."""
    return max((_f1(prediction, gold_text) for gold_text in _as_list(gold_texts)), default=0.0)


def math_equal(prediction: str, gold_texts: GoldTexts) -> float:
    """1.0 where the final numbers or expressions are mathematically equal, units and prose aside.

    math-verify's timeouts need signals, which exist in the main thread only: they are off, and what could compute
    without end (towers of powers, factorials, integrals) is compared as text. An answer that math-verify cannot read
    is judged by the last number in it.
    """
    return float(any(_math_matches(prediction, gold_text) for gold_text in _as_list(gold_texts)))


def _as_list(gold_texts: GoldTexts) -> Sequence[str]:
    return [gold_texts] if isinstance(gold_texts, str) else gold_texts


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _matches(prediction: str, gold_text: str) -> bool:
    if not prediction.strip():
        return False
    left, right = normalize(prediction), normalize(gold_text)
    if not left or not right:  # nothing but articles and punctuation: the option "A" is not the option "The"
        return prediction.strip().lower() == gold_text.strip().lower()
    return left == right


def _f1(prediction: str, gold_text: str) -> float:
    left, right = Counter(normalize(prediction).split()), Counter(normalize(gold_text).split())
    if not left or not right:
        return float(_matches(prediction, gold_text))
    common = (left & right).total()
    return 2 * common / (left.total() + right.total())


class _WordTokenizer:
    """Words of any script; one token a character where a script has no blanks (Thai, Lao, Burmese, Khmer, CJK)."""

    _UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    _TOKENS = re.compile(rf"{_UNSPACED}|\w+?(?={_UNSPACED}|\b)")

    def tokenize(self, text: str) -> list[str]:
        return self._TOKENS.findall(text.lower())


def _is_ascii_text(text: str) -> bool:
    letters = [character for character in text if character.isalnum()]
    return 2 * sum(character.isascii() for character in letters) >= len(letters)


@functools.cache
def _rouge_scorer(ascii_only: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    if ascii_only:
        return RougeScorer(list(ROUGE_NAMES), use_stemmer=True)
    return RougeScorer(list(ROUGE_NAMES), tokenizer=_WordTokenizer())


def _math_matches(prediction: str, gold_text: str) -> bool:
    parse, verify = _math_verify()
    answer = parse(_final_answer(prediction), parsing_timeout=None)
    gold = parse(_final_answer(gold_text), parsing_timeout=None)
    if not answer or not gold:
        numbers = _last_number(prediction), _last_number(gold_text)
        return None not in numbers and numbers[0] == numbers[1]
    # math-verify returns [expression, the text it came from].
    if not all(_magnitude(parsed[0]) < LARGEST_NUMBER for parsed in (answer, gold)):
        return answer[-1] == gold[-1]
    return bool(verify(gold, answer, timeout_seconds=None))


@functools.cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., bool]]:
    from math_verify import parse, verify

    # It warns that timeouts are off, and of every answer that it cannot read: a normal thing in a model's output.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify


def _final_answer(text: str) -> str:
    """GSM8K's convention: the answer follows ####."""
    return text.rpartition("####")[2]


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _magnitude(expression: Any) -> float:
    """A generous bound on every number that evaluating the expression passes through; infinite where none is known."""
    from sympy import Function, Pow, sympify
    from sympy.concrete.expr_with_limits import ExprWithLimits
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    if isinstance(expression, str):
        return 1.0
    node = sympify(expression)
    if isinstance(node, (CombinatorialFunction, ExprWithLimits)):
        return float("inf")
    if node.is_Number:
        return float(min(abs(node), 10 * LARGEST_NUMBER)) if node.is_finite else float("inf")
    inner = [_magnitude(child) for child in node.args]
    if isinstance(node, Pow):
        return _power(max(inner[0], 2.0), inner[1])
    if isinstance(node, Function) and inner:
        return _power(3.0, max(inner))  # exp and its like grow no faster, for the few that a text can name
    bound = 1.0
    for value in inner:  # bounds a sum and a product alike
        bound *= 1.0 + value
    return bound


def _power(base: float, exponent: float) -> float:
    try:
        return base**exponent
    except OverflowError:
        return float("inf")

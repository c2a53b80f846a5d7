"""`--metrics rouge,em,math,mymodule:myfunction` -> the numbers of one answer, each called by its metric's name."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.metrics.text import ROUGE_NAMES, exact_match, f1, math_equal, rouge

Metric = Callable[[str, Sequence[str]], float]

GROUPS = {"rouge": ROUGE_NAMES, "em": ("exact_match",), "squad": ("exact_match", "f1")}
SINGLE: dict[str, Metric] = {"exact_match": exact_match, "f1": f1, "math": math_equal}
KNOWN = (*GROUPS, *ROUGE_NAMES, *SINGLE)


def metric_names(wanted: Sequence[str], key: str = "--metrics") -> list[str]:
    """The names of the scores, groups spelt out, each once. Raises UserError for an unknown one; imports nothing."""
    names: list[str] = []
    for name in wanted:
        if ":" in name or name in SINGLE or name in ROUGE_NAMES:
            names.append(name)
        elif name in GROUPS:
            names += GROUPS[name]
        else:
            near = get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{key}: unknown metric {name!r}{hint} There are {', '.join(KNOWN)}, and your own as module:function"
            )
    return list(dict.fromkeys(names))


class Scorer:
    """Scores of one answer against its gold answers, 0 for an empty answer under the built-in metrics.

    A metric of your own is called with (prediction, gold answers) - a text and a list of texts - and returns a number.
    Its module is looked for in the working directory, too.

    Raises:
        UserError: an unknown metric, or a module or function that is not there.
    """

    def __init__(self, wanted: Sequence[str], key: str = "--metrics") -> None:
        self.names = metric_names(wanted, key)
        self._own = {name: _find(name, key) for name in self.names if ":" in name}

    def __call__(self, prediction: str, gold_texts: Sequence[str]) -> dict[str, float]:
        """One number for each name. Raises UserError when a metric of your own fails or returns none."""
        rouges = rouge(prediction, gold_texts) if set(self.names) & set(ROUGE_NAMES) else {}
        scores = {}
        for name in self.names:
            if name in rouges:
                scores[name] = rouges[name]
            elif name in SINGLE:
                scores[name] = SINGLE[name](prediction, gold_texts)
            else:
                scores[name] = _own_number(name, self._own[name], prediction, list(gold_texts))
        return scores


def _find(name: str, key: str) -> Metric:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}: {name}: cannot import {module_name} from {here} or what is installed: {error}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}: {name}: {module_name} has no function {function_name!r}")
    return function


def _own_number(name: str, metric: Metric, prediction: str, gold_texts: list[str]) -> float:
    """The number of a user's own metric. Whatever goes wrong in its code becomes a UserError."""
    try:
        value: object = metric(prediction, gold_texts)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: failed on the answer {prediction[:80]!r}: {what}") from error
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise UserError(f"{name}: must return a finite number for an answer, got {value!r}")

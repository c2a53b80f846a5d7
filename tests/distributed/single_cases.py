"""The one-process references of `test_numerics.py` and `test_evaluate.py`."""

from tests.distributed.evaluate_cases import still_case
from tests.distributed.numerics_cases import gradient_case, rewrite_case, uneven_case

CASES = {
    **{f"gradient-0-{micro}": gradient_case(0, micro) for micro in (1, 2, 4)},
    **{f"uneven-0-{number}": uneven_case(0, number) for number in (1, 5)},
    "rewrite-0": rewrite_case(0),
    "still": still_case,
}

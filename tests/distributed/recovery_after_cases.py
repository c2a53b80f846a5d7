"""What one rank makes of what the two of `test_recovery.py` have left."""

from tests.distributed.recovery_cases import RESHARDED, take_case

CASES = {f"take-{name}": take_case(name, 2) for name in RESHARDED}

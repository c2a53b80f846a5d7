"""What one rank leaves for the two of `test_recovery.py`."""

from tests.distributed.recovery_cases import RESHARDED, leave_case

CASES = {f"leave-{name}": leave_case(name) for name in RESHARDED}

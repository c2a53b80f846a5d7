"""What one process makes of what `qlora_cases` does on two ranks."""

from tests.distributed.qlora_cases import CASES as ALL

CASES = {"nf4-zero0": ALL["nf4-zero0"]}

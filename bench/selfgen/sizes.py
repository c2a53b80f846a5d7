"""How much work a row is, and what the rows are."""

from __future__ import annotations

from dataclasses import dataclass

MIX_RATES = (0.1, 0.25)
SINGLE_ROWS, RANK_ROWS = ("S1", "S2", "S3", "S6"), ("S4", "S5")
ROWS = tuple(sorted(SINGLE_ROWS + RANK_ROWS))


@dataclass(frozen=True)
class Sizes:
    """Sequences, lengths in tokens and repeats. A side that takes minutes is repeated `slow_repeats` times."""

    rows: int = 8  # sequences of S1, S2, S3 and S6: one batch
    rows_per_rank: int = 4  # S4
    drafts_per_rank: int = 8  # S5
    draft_rows: int = 4  # S5: rows decoded together on a rank, on every side
    num_tokens: int = 128  # T, response tokens of a mixed context
    max_prompt_tokens: int = 128
    max_new_tokens: int = 64  # S5
    train_steps: int = 3  # between the visits of S6
    repeats: int = 3
    close_repeats: int = 9  # of sides that differ by little
    slow_repeats: int = 1
    plot_mix_rates: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    plot_num_tokens: tuple[int, ...] = (32, 64, 128)
    timeout_seconds: float = 3600.0  # of all single rows, and of all rows on ranks


SMOLLM2 = Sizes()
# As many tokens, for the same bars apply to calls; a random model of two layers says nothing about time.
TINY = Sizes(
    max_prompt_tokens=64,
    max_new_tokens=24,
    repeats=2,
    close_repeats=2,
    slow_repeats=2,
    plot_num_tokens=(32, 128),
    timeout_seconds=300.0,
)

"""What the sampler is asked, what it answers, and what that cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnDone = Callable[[int, int], None]  # called with (done, total) whenever more requests are done
OnDoneOf = Callable[[str], OnDone]  # the callback of a phase of the work, by the phase's name


@dataclass
class Request:
    """One sequence to sample. Tokens are plain integers; `coins[t]` says whether position t is the model's."""

    prompt_ids: list[int]
    guess_ids: list[int]
    coins: list[bool]
    key: int  # noise.sequence_key
    stop_ids: frozenset[int] = frozenset()
    guess_length: int | None = None  # leading positions where the guess is worth trying; None: all of them
    # Texts that the sample may repeat: look-ups in them, in the prompt and in the sample extend the guess. None: none.
    corpora: tuple[list[int], ...] | None = None
    feeds_all: bool = False  # also what follows its last coin, up to the last token but one


@dataclass
class Sampled:
    """The fixed point of one request: its tokens (cut after a stop id) and what they cost."""

    tokens: list[int]
    passes: int = 0
    flips: int = 0  # draws that differ from the last draw of the same coin
    ties: int = 0  # draws in which rounding may have decided
    stopped: bool = False


@dataclass(frozen=True)
class CallLimit:
    """What one call of the model may take on a rank: tokens fed, for their activations; and logits, of each a row [V].

    A prompt that is longer than `tokens` is read in several calls.
    """

    tokens: int = 2**31
    logits: int = 2**31


@dataclass
class SamplerStats:
    """Cost of a batch, or of several added up."""

    calls: int = 0
    token_forwards: int = 0
    response_tokens: int = 0
    row_passes: int = 0
    final_coins: int = 0  # coins decided; over row_passes: the mean accepted length
    draws: int = 0
    first_draws: int = 0  # draws at coins that had a guess and were not drawn before
    misses: int = 0  # first draws that differ from the guess
    redraws: int = 0  # draws at coins that an earlier pass drew with the same noise
    flips: int = 0  # redraws that differ
    moved: float = 0.0  # sum over redraws of an estimate of the total variation distance since the last draw
    ties: int = 0
    verified: int = 0  # coins drawn once more at the fixed point
    mismatches: int = 0  # of them, those that came out differently: rounding

    def add(self, other: SamplerStats) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def accepted_length(self) -> float:
        """Coins made final by one pass over one row, on average; 1 is token by token."""
        return self.final_coins / self.row_passes if self.row_passes else 0.0

    @property
    def flip_rate(self) -> float:
        """Share of redraws that changed the token."""
        return self.flips / self.redraws if self.redraws else 0.0

    @property
    def flip_bound(self) -> float:
        """What shared Gumbel noise allows at most on average: 2 TV / (1 + TV) (Daliri et al. 2024; concave in TV)."""
        tv = self.moved / self.redraws if self.redraws else 0.0
        return 2 * tv / (1 + tv)

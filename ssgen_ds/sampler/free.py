"""Free decoding: a request of the sampler in which every token is the model's own."""

from __future__ import annotations

from dataclasses import dataclass

from ssgen_ds.sampler.requests import Request, Sampled


@dataclass(frozen=True)
class FreeSample:
    """What free decoding gave: the tokens, and the stop id that ended them; None: there was no room for one."""

    ids: list[int]
    stop_id: int | None

    @property
    def sampled_ids(self) -> list[int]:
        """All tokens that were sampled, the stop id included."""
        return self.ids if self.stop_id is None else [*self.ids, self.stop_id]


def free_sample(sampled: Sampled) -> FreeSample:
    """The sampler's result, the stop id taken off its end."""
    return FreeSample(content_ids(sampled), sampled.tokens[-1] if sampled.stopped else None)


def free_request(
    prompt_ids: list[int],
    max_tokens: int,
    key: int,
    stop_ids: frozenset[int],
    guess_ids: list[int] | None = None,
    corpora: tuple[list[int], ...] | None = None,
) -> Request:
    """Free decoding: every coin is 1, up to a stop id or `max_tokens`.

    Guesses only matter for speed: `guess_ids` position by position, `corpora` for look-ups, the most alike first. The
    prompt and what is generated are looked up in, too; None turns look-ups off.
    """
    guess = (guess_ids or [])[:max_tokens]
    padded = guess + [0] * (max_tokens - len(guess))
    return Request(prompt_ids, padded, [True] * max_tokens, key, stop_ids, len(guess), corpora)


def content_ids(sampled: Sampled) -> list[int]:
    """Tokens of a free sample without the stop id that ended it."""
    return sampled.tokens[:-1] if sampled.stopped else sampled.tokens

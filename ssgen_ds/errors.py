"""The one exception that means "the user's input is wrong": printed without a traceback, exit code 2."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on request with a complete checkpoint; EX_TEMPFAIL of sysexits.h: requeue me


class UserError(Exception):
    """Something the user can fix. The message names the place and the fix."""

    @classmethod
    def from_list(cls, heading: str, problems: list[str]) -> UserError:
        return cls("\n".join([heading, *(f"  - {problem}" for problem in problems)]))


class RankError(UserError):
    """A user error that the other ranks may not know of: this rank says it, whichever it is."""


class StopRequested(Exception):
    """Raised at a safe point after a signal, on every rank, once a complete checkpoint is written."""


class GenerationInterrupted(Exception):
    """A stop was requested while the model generated; raised on every rank at the same place."""


class NonFiniteError(Exception):
    """The model computes NaN or infinity and the run ends; raised on every rank, the weights are the last good ones."""


class RankLost(Exception):
    """Another rank has gone; the message names it and where it was last seen."""

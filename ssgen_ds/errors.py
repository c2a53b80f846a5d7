"""The one exception that means "the user's input is wrong": printed without a traceback, exit code 2."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on request with a complete checkpoint; EX_TEMPFAIL of sysexits.h: requeue me


class UserError(Exception):
    """Something the user can fix. The message names the place and the fix."""

    @classmethod
    def from_list(cls, heading: str, problems: list[str]) -> UserError:
        return cls("\n".join([heading, *("  - " + problem.replace("\n", "\n    ") for problem in problems)]))


class Problems:
    """Asks one question after another and keeps what is wrong, so that the user hears of everything in one start.

    problems = Problems()
    settings = problems.ask(lambda: read_settings(file))
    if settings is not None:
        problems.ask(lambda: check_settings(settings))
    problems.refuse()
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._found = list(known)

    @property
    def found(self) -> list[str]:
        """One text for each problem, each text once."""
        return list(dict.fromkeys(self._found))

    def ask(self, question: Callable[[], T]) -> T | None:
        """The answer; None where there is a problem. What needs the answer is then not asked."""
        try:
            return question()
        except SeveralProblems as error:
            self._found += error.problems
        except UserError as error:
            self._found.append(str(error))
        except OSError as error:
            self._found.append(f"{socket.gethostname()}: {error}")
        return None

    def add(self, problems: Iterable[str]) -> None:
        self._found += problems

    def collect(self, question: Callable[[], list[str]]) -> None:
        """Keep the problems that a check returns, or the one that it raises."""
        self.add(self.ask(question) or [])

    def refuse(self, where: str = "") -> None:
        """Raise what was found, if anything: one problem as it is, several in a list below `where` and their number."""
        if len(self.found) == 1:
            raise UserError(self.found[0])
        if self.found:
            raise SeveralProblems(self.found, where)


class SeveralProblems(UserError):
    """Several independent problems in one message."""

    def __init__(self, problems: list[str], where: str = "") -> None:
        self.problems = problems
        heading = f"{where}: " if where else ""
        super().__init__(str(UserError.from_list(f"{heading}{len(problems)} problems", problems)))


class RankError(UserError):
    """A user error that the other ranks may not know of: this rank says it, whichever it is."""


class StopRequested(Exception):
    """Raised at a safe point after a signal, on every rank, once a complete checkpoint is written."""


class GenerationInterrupted(Exception):
    """A stop was requested while the model generated; raised on every rank at the same place."""


class NonFiniteError(Exception):
    """The model computes NaN or infinity and the run ends; raised on every rank, the weights are the last good ones."""


class NotPublished(Exception):
    """What was made is not what it must be: it is not written, and what was there before stays."""


class RankLost(Exception):
    """Another rank has gone; the message names it and where it was last seen."""

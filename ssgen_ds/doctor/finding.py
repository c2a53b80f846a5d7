"""What a check says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what is so, why it hurts and what mends it (empty where all is well)."""

    level: Level
    check: str
    what: str
    why: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, what: str) -> list[Finding]:
    """All is well."""
    return [Finding("ok", check, what)]


def note(check: str, what: str, why: str, fix: str) -> Finding:
    return Finding("note", check, what, why, fix)


def warning(check: str, what: str, why: str, fix: str) -> Finding:
    return Finding("warning", check, what, why, fix)


def error(check: str, what: str, why: str, fix: str) -> Finding:
    return Finding("error", check, what, why, fix)

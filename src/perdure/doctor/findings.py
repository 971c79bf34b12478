"""What a check has found: how things are, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much it matters."""

    OK = "ok"
    NOTE = "note"
    """It is so, and may be meant so."""
    WARNING = "warning"
    """It works, and won't for ever, or not as well as it could."""
    PROBLEM = "problem"
    """Something doesn't work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        check: Which check it is of.
        level: How much it matters.
        text: How things are.
        advice: What to do about it; empty where there is nothing to do.
        sql: Statements that mend it, in order, for whoever owns the schema.
    """

    check: str
    level: Level
    text: str
    advice: str = ""
    sql: tuple[str, ...] = ()


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, level=Level.OK, text=text)


def note(check: str, text: str, advice: str = "") -> Finding:
    return Finding(check=check, level=Level.NOTE, text=text, advice=advice)


def warning(check: str, text: str, advice: str, *sql: str) -> Finding:
    return Finding(check=check, level=Level.WARNING, text=text, advice=advice, sql=sql)


def problem(check: str, text: str, advice: str, *sql: str) -> Finding:
    return Finding(check=check, level=Level.PROBLEM, text=text, advice=advice, sql=sql)

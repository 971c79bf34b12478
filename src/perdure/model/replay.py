"""What a replay shows: whether today's code fits what a workflow has recorded. Decisions only; who runs is the engine.

- *matches*: everything that was recorded was asked for, and what has ended ends the same way;
- *differs*: a worker would go on, but on another path: the code asks for something new before all that was recorded is
  served, no longer asks for something, or comes to another end;
- *mismatch*: a worker would fail the workflow: the code asks for something else than what was recorded, can't read its
  input any more, raises where it went on before, or doesn't come to rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, cast
from uuid import UUID

from perdure.model.keys import RESULT
from perdure.model.records import Recorded

_FROM_OUTSIDE = frozenset(
    f"perdure.errors.{name}"
    for name in ("DeadlineExceeded", "ForeignAwait", "RecoveryLimitExceeded", "ReplayMismatch", "WorkflowCancelled")
)
"""Errors in which a workflow ends, whatever its code does."""


class Verdict(StrEnum):
    """Whether code fits a history: see the module."""

    MATCHES = "matches"
    DIFFERS = "differs"
    MISMATCH = "mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A workflow and what it has recorded.

    Attributes:
        workflow_id: The workflow.
        name: Its name.
        outcomes: Its input and outcomes, in order.
        result: How it ended, its payload decoded; None: it hasn't.
        deadline: When it must have ended.
    """

    workflow_id: UUID
    name: str
    outcomes: tuple[Recorded, ...]
    result: Recorded | None = None
    deadline: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Where the code came to rest, with nothing recorded left that it has asked for.

    Attributes:
        note: Where, in words.
        status: How it ended; None: it goes on from there.
        payload: Its result, or its failure, as JSON.
    """

    note: str
    status: str | None = None
    payload: str = ""

    @property
    def said(self) -> str:
        """What it would do next, or what it ended with."""
        return self.note if self.status is None else _said(self.status, self.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a replay.

    Attributes:
        workflow_id: The workflow.
        name: Its name.
        verdict: Whether the code fits what was recorded.
        note: How far it came, or how they part.
        key: Where they part; empty where they don't.
        position: The how-manieth outcome that is; 0: none.
        recorded: What stands there.
        asked: What the code asks for.
        version: The version of the code that recorded it.
    """

    workflow_id: UUID
    name: str
    verdict: Verdict
    note: str
    key: str = ""
    position: int = 0
    recorded: str = ""
    asked: str = ""
    version: str = ""


def judge(history: History, rest: Rest, left: Mapping[str, Recorded], new: Mapping[str, str]) -> Replayed:
    """What a replay of that history shows.

    Args:
        history: What was recorded.
        rest: Where the code came to rest.
        left: What was recorded, and the code didn't ask for; also waits and children that have no outcome yet.
        new: What the code asked for, and wasn't recorded: key and description, in order.
    """
    return (
        _mismatch(history, rest)
        or _other_path(history, left, new)
        or _other_end(history, rest)
        or _replayed(history, Verdict.MATCHES, rest.note)
    )


def _mismatch(history: History, rest: Rest) -> Replayed | None:
    error = _error(rest.payload) if rest.status == "error" else None
    if error is None:
        return None
    if error["type"] == "perdure.errors.ReplayMismatch":
        said: list[Any] = [*error["args"], "", "", "", 0, ""]
        key, recorded, asked, position, version = said[:5]
        note = "the code asks for something else than what was recorded"
        return _replayed(history, Verdict.MISMATCH, note, key, recorded, asked, position, version)
    if history.result is None:
        # A workflow whose step or child has failed for good may well be about to fail of that.
        failed = {each.key for each in history.outcomes if each.kind in ("step", "child") and each.status != "success"}
        if failed.intersection(error["steps"]):
            return None
        return _replayed(history, Verdict.MISMATCH, "a worker would end it in error", asked=rest.said)
    if history.result.status == "success":
        recorded = _said("success", history.result.payload or "null")
        return _replayed(history, Verdict.MISMATCH, "it fails, and had succeeded", RESULT, recorded, rest.said)
    return None


def _other_path(history: History, left: Mapping[str, Recorded], new: Mapping[str, str]) -> Replayed | None:
    if not left:
        return None
    first = min(left.values(), key=lambda each: each.position)
    asked = next(iter(new.values()), None)
    note = "the code doesn't ask for it any more" if asked is None else "the code asks for something new first"
    return _replayed(
        history, Verdict.DIFFERS, note, first.key, first.described, asked or "", first.position, first.version or ""
    )


def _other_end(history: History, rest: Rest) -> Replayed | None:
    result = history.result
    if result is None:
        return None
    payload = result.payload or "null"
    if result.status == "success":
        same = rest.status == "success" and json.loads(rest.payload) == json.loads(payload)
    else:
        kind = _error(payload)["type"]
        same = kind in _FROM_OUTSIDE or (rest.status == result.status and _error(rest.payload)["type"] == kind)
    if same:
        return None
    recorded = _said(result.status, payload)
    note = "it comes to another end" if rest.status else "it doesn't end"
    return _replayed(history, Verdict.DIFFERS, note, RESULT, recorded, rest.said, 0, result.version or "")


def _replayed(
    history: History,
    verdict: Verdict,
    note: str,
    key: str = "",
    recorded: str = "",
    asked: str = "",
    position: int = 0,
    version: str = "",
) -> Replayed:
    return Replayed(
        workflow_id=history.workflow_id,
        name=history.name,
        verdict=verdict,
        note=note,
        key=key,
        recorded=recorded,
        asked=asked,
        position=position,
        version=version,
    )


def _said(status: str, payload: str) -> str:
    if status == "success":
        return f"the result {payload}"
    error = _error(payload)
    return f"{error['type'] or status}: {error['message']}"


def _error(payload: str) -> dict[str, Any]:
    """A recorded failure, whatever stands there."""
    try:
        error: Any = json.loads(payload)
    except ValueError:
        error = None
    found = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    args: list[Any] = found["args"] if isinstance(found.get("args"), list) else []
    steps: list[Any] = found["steps"] if isinstance(found.get("steps"), list) else []
    keys = [each for each in steps if isinstance(each, str)]
    return {"type": "", "message": "", **found, "args": args, "steps": keys}

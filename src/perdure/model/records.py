"""What is read from the database and what is written to it, as values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from perdure.model.statuses import Status


class Checkpoint(NamedTuple):
    """An outcome that a run records. In the order of the parameters of the statement."""

    key: str
    kind: str
    position: int
    status: str
    payload: str | None
    args_hash: int = 0
    attempts: int = 1
    duration: float | None = None
    delay: float | None = None


class Recorded(NamedTuple):
    """An outcome that was recorded, as a replay reads it.

    `remaining`: of a failed attempt or a timer, the seconds until it was due, at the time of loading.
    """

    key: str
    kind: str
    position: int
    status: str
    payload: str | None
    args_hash: int
    attempts: int
    remaining: float | None
    version: str | None = None

    @property
    def described(self) -> str:
        """What it is, in words."""
        if self.kind == "step":
            name = self.key.rpartition("/")[2].partition("#")[0]
            return f"step {name!r}"
        if self.kind == "start":
            return "the start of a child"
        return f"a {self.kind}"


class Suspension(NamedTuple):
    """How a run leaves memory: what it waits for, and until when (by the loop's clock; None: until it is woken).

    `seen`: how often it had been woken when it last looked. `aside`: keys of checkpoints that its next run asks anew.
    `hears`: whether a message wakes it. `awaits_child`: whether the end of a child does.
    """

    waiting_for: str
    due: float | None
    seen: int
    aside: tuple[str, ...] = ()
    hears: bool = False
    awaits_child: bool = False


class Message(NamedTuple):
    """What was sent to a workflow; places are in the order in which it gets them.

    `question`: its id, if its sender waits for an answer.
    """

    place: int
    topic: str
    payload: str
    question: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A workflow that this worker holds. (worker id, epoch) is its fencing token."""

    workflow_id: UUID
    name: str
    worker_id: UUID
    epoch: int
    input: str
    started_at: datetime
    recoveries: int = 0
    stalls: int = 0
    wakes: int = 0
    deadline: datetime | None = None
    parent_id: UUID | None = None
    history: tuple[Recorded, ...] = ()
    messages: tuple[Message, ...] = ()


class Result(NamedTuple):
    """How a workflow ended. `payload` is JSON: the output, or the recorded failure."""

    workflow_id: UUID
    status: str
    payload: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowInfo:
    """A row of the view `workflows`. Payloads are decoded JSON."""

    id: UUID
    name: str
    key: str | None
    status: Status
    queue: str
    priority: int
    partition: str | None
    input: Any
    output: Any
    error: Any
    worker_id: UUID | None
    epoch: int
    recoveries: int
    parent_id: UUID | None
    version: str | None
    attributes: Any
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    wake_at: datetime | None
    waiting_for: str | None
    deadline: datetime | None
    completed_at: datetime | None
    forked_from: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """A row of the view `workflow_steps`. Payloads are decoded JSON."""

    workflow_id: UUID
    key: str
    name: str
    kind: str
    position: int | None
    status: str
    output: Any
    error: Any
    attempts: int
    started_at: datetime | None
    completed_at: datetime | None
    created_at: datetime
    worker_id: UUID | None
    epoch: int
    version: str | None
    wake_at: datetime | None


Info = TypeVar("Info", WorkflowInfo, StepInfo)
_PAYLOADS = frozenset({"input", "output"})
_JSON = _PAYLOADS | {"error", "attributes"}


def info(kind: type[Info], row: Any, decoded: Callable[[str], str]) -> Info:
    """A row of a view as a value; columns that this version doesn't know are ignored.

    Args:
        kind: Which view.
        row: The row, by name.
        decoded: Makes of a payload what it was before a codec changed it.
    """
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(row, field.name)
        if value is not None and field.name in _JSON:
            value = json.loads(decoded(value) if field.name in _PAYLOADS else value)
        values[field.name] = value
    if kind is WorkflowInfo:
        values["status"] = Status(values["status"])
        values["recoveries"] = values["recoveries"] or 0
    return kind(**values)

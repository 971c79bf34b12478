"""What happens, as typed events: tests wait for them, exporters subscribe to them, and the log shows them.

    unsubscribe = telemetry.subscribe(print)

An event names workflow, step and attempt, never a payload. Each class has a level: what an operator must know is logged
at WARNING or ERROR by the logger `perdure`, the life of a workflow at INFO, each step at DEBUG. A subscriber is called
in the thread where it happens, and must not block; one that raises is reported and goes on being called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar
from uuid import UUID

logger = logging.getLogger("perdure")
_subscribers: list[Callable[[Event], None]] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    level: ClassVar[int] = logging.INFO
    text: ClassVar[str] = ""
    """The log line, a format of the fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted(Event):
    worker_id: UUID
    app: str
    names: tuple[str, ...]
    queues: tuple[str, ...] | None
    text: ClassVar[str] = "worker {worker_id} runs app {app!r} ({names_})"

    @property
    def names_(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStopped(Event):
    worker_id: UUID
    handed_over: int
    text: ClassVar[str] = "worker {worker_id} stopped; {handed_over} workflows handed over"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseLost(Event):
    worker_id: UUID
    reason: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "worker {worker_id} lost its lease ({reason}); its runs end here, and it registers anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBuried(Event):
    worker_id: UUID
    host: str
    pid: int
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "worker {worker_id} ({host}, pid {pid}) is dead: its lease ran out"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowsRecovered(Event):
    worker_id: UUID
    workflows: tuple[UUID, ...]
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{count} workflows of the dead worker {worker_id} are pending again"

    @property
    def count(self) -> int:
        return len(self.workflows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled(Event):
    worker_id: UUID
    released: int
    dropped: int
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = (
        "worker {worker_id} and the database disagreed on what it holds: "
        "{released} workflows released, {dropped} runs dropped"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowClaimed(Event):
    workflow_id: UUID
    name: str
    epoch: int
    recoveries: int
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "workflow {name} {workflow_id} claimed (epoch {epoch}, recoveries {recoveries})"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowEnded(Event):
    """Its result is durable."""

    workflow_id: UUID
    name: str
    status: str
    text: ClassVar[str] = "workflow {name} {workflow_id} ended: {status}"
    level: ClassVar[int] = logging.DEBUG


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowSuspended(Event):
    """It has left memory, and waits as a row. `seconds`: for so long at most; None: until somebody wakes it."""

    workflow_id: UUID
    name: str
    waiting_for: str
    seconds: float | None
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "workflow {name} {workflow_id} waits for {waiting_for}{limit}"

    @property
    def limit(self) -> str:
        return "" if self.seconds is None else f", {self.seconds:.3g} s at most"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowsWoken(Event):
    """What was due is pending again."""

    queues: tuple[str, ...]
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "timers woke workflows of {queues}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowCancelling(Event):
    """Its code gets CancelledError in this moment: it was cancelled, or its deadline has passed."""

    workflow_id: UUID
    name: str
    why: str
    text: ClassVar[str] = "workflow {name} {workflow_id} is told to end: {why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRetries(Event):
    """It failed, and runs again after a pause, from its last checkpoint."""

    workflow_id: UUID
    name: str
    attempt: int
    error_type: str
    seconds: float
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = (
        "workflow {name} {workflow_id} failed with {error_type} (attempt {attempt}); again in {seconds:.3g} s"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowContinued(Event):
    """It continues as new: it is pending, with another input and an empty history."""

    workflow_id: UUID
    name: str
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "workflow {name} {workflow_id} continues as new"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitsForeign(Event):
    """A workflow's own code waits for what isn't recorded; told once for each line."""

    workflow_id: UUID
    name: str
    what: str
    line: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = (
        "workflow {name} {workflow_id} waits for {what} at {line}: a replay would begin that anew; do it in a step, "
        "and wait with perdure.sleep() and perdure.timeout()"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowsDeleted(Event):
    """Retention has deleted what was over for long enough."""

    count: int
    text: ClassVar[str] = "retention deleted {count} workflows that had ended long enough ago"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParked(Event):
    """Its attempts are used up, and it waits for an operator: `resume` tries it anew."""

    workflow_id: UUID
    workflow: str
    key: str
    attempt: int
    error_type: str
    level: ClassVar[int] = logging.ERROR
    text: ClassVar[str] = (
        "step {key} of {workflow} {workflow_id} is parked after {attempt} attempts ({error_type}); "
        "'perdure workflow resume {workflow_id}' tries it anew"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowErrored(Event):
    workflow_id: UUID
    name: str
    error_type: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "workflow {name} {workflow_id} failed with {error_type}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAbandoned(Event):
    workflow_id: UUID
    name: str
    epoch: int
    reason: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "run of {name} {workflow_id} (epoch {epoch}) given up here: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutlived(Event):
    """A task of a run that ended doesn't end."""

    workflow_id: UUID
    name: str
    task: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "task {task} of {name} {workflow_id} swallows its cancellation, and is left alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted(Event):
    """Its body is about to run. `idempotent`: running it again does no harm, its author says."""

    workflow_id: UUID
    workflow: str
    key: str
    attempt: int
    idempotent: bool
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "step {key} of {workflow} {workflow_id} starts (attempt {attempt})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded(Event):
    """Its outcome goes to the code; it is durable a little later."""

    workflow_id: UUID
    workflow: str
    key: str
    attempt: int
    status: str
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "step {key} of {workflow} {workflow_id} ended: {status} (attempt {attempt})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetries(Event):
    workflow_id: UUID
    workflow: str
    key: str
    attempt: int
    error_type: str
    seconds: float
    text: ClassVar[str] = (
        "step {key} of {workflow} {workflow_id} failed with {error_type} (attempt {attempt}); again in {seconds:.3g} s"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownNames(Event):
    queue: str
    names: tuple[str, ...]
    parked: bool
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "queue {queue!r} holds workflows that this worker doesn't know: {names_}{fate}"

    @property
    def names_(self) -> str:
        return ", ".join(self.names)

    @property
    def fate(self) -> str:
        return "; they are parked until a worker knows them" if self.parked else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushBegins(Event):
    """What these workflows have recorded is about to be sent."""

    workflows: int
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "flush of {workflows} workflows begins"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushCommitted(Event):
    workflows: int
    checkpoints: int
    ended: int
    suspended: int
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = (
        "flush: {checkpoints} checkpoints of {workflows} workflows, {ended} ended, {suspended} suspended"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushInDoubt(Event):
    workflows: int
    reason: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "a flush for {workflows} workflows got no answer ({reason}); it will be settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRefused(Event):
    workflow_id: UUID
    name: str
    reason: str
    level: ClassVar[int] = logging.ERROR
    text: ClassVar[str] = "the database refuses what {name} {workflow_id} records: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseLost(Event):
    component: str
    reason: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{component}: the database can't be reached ({reason}); trying again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseBack(Event):
    component: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{component}: the database is back"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseNotice(Event):
    message: str
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "notice of the database: {message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLost(Event):
    reason: str
    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "the listener lost its connection ({reason}); polling goes on"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBlocked(Event):
    """Something blocks the event loop: no other workflow of this process goes on meanwhile."""

    seconds: float
    stack: str
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = (
        "the event loop has been blocked for {seconds:.1f} s (make the step a plain def, or await); it stands here:\n"
        "{stack}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAttached(Event):
    """A start found its key taken, with other arguments than it gave."""

    name: str
    key: str
    workflow_id: UUID
    text: ClassVar[str] = "start of {name} attached to {workflow_id} by key {key!r}; its arguments differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsUnasked(Event):
    """A recorded step that the code no longer asked for."""

    workflow_id: UUID
    name: str
    keys: tuple[str, ...]
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{name} {workflow_id} ended without asking for what was recorded: {keys}"


def subscribe(subscriber: Callable[[Event], None]) -> Callable[[], None]:
    """Call `subscriber` with every event from now on; returns what ends that."""
    _subscribers.append(subscriber)

    def unsubscribe() -> None:
        with suppress(ValueError):
            _subscribers.remove(subscriber)

    return unsubscribe


def wanted(kind: type[Event]) -> bool:
    """Whether anybody would see an event of that kind: where events are many, ask before you make one."""
    return bool(_subscribers) or logger.isEnabledFor(kind.level)


def emit(event: Event) -> None:
    """Tell the subscribers and the log."""
    for subscriber in tuple(_subscribers):
        try:
            subscriber(event)
        except Exception:
            logger.exception("a subscriber of events failed on %s", type(event).__name__)
    if logger.isEnabledFor(event.level):
        logger.log(event.level, "%s", _Line(event), extra={"perdure": as_dict(event)})


def as_dict(event: Event) -> dict[str, Any]:
    """The event as plain data: its name and its fields."""
    return {"event": type(event).__name__} | {field.name: getattr(event, field.name) for field in fields(event)}


class _Line:
    """The text of an event, made only if a handler wants it."""

    __slots__ = ("event",)

    def __init__(self, event: Event) -> None:
        self.event = event

    def __str__(self) -> str:
        event = self.event
        return event.text.format_map(_Fields(event)) if event.text else repr(event)


class _Fields(dict[str, Any]):
    def __init__(self, event: Event) -> None:
        super().__init__()
        self._event = event

    def __missing__(self, name: str) -> Any:
        return getattr(self._event, name)

"""The interleavings that the protocols name: a run of the simulation says which of them its seeds have reached.

A simulation that never gets to a place says nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from perdure import telemetry
from perdure.model.keys import CANCELLED

FLUSHES = ("record", "complete", "settle")

Statement = Callable[[str, Any, Any], bool]
"""Whether a statement that was answered (name, parameters, rows) shows it."""
Failure = Callable[[str], bool]
Event = Callable[[telemetry.Event], bool]
Note = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Point:
    """A named interleaving, and what shows that it has come about."""

    section: str
    name: str
    statement: Statement | None = None
    unanswered: Failure | None = None
    event: Event | None = None
    note: Note | None = None

    def __str__(self) -> str:
        return f"§{self.section} {self.name}"


def _rows(statement: str, fits: Callable[[Any], bool] = lambda row: True) -> Statement:
    return lambda name, params, rows: name == statement and any(fits(row) for row in rows)


def _first(fits: Callable[[Any], bool], *statements: str) -> Statement:
    return lambda name, params, rows: name in statements and fits(rows[0])


def _nothing(statement: str) -> Statement:
    return lambda name, params, rows: name == statement and not rows


def _fewer(statement: str) -> Statement:
    """Fewer rows than ids."""
    return lambda name, params, rows: name == statement and len(rows) < len(params[1])


def _event(kind: type[telemetry.Event], fits: Callable[[Any], bool] = lambda event: True) -> Event:
    return lambda event: isinstance(event, kind) and fits(event)


def _note(what: str, *names: str) -> Note:
    return lambda noted, name: noted == what and (not names or name in names)


def _reason(kind: type[Any], words: str) -> Event:
    return lambda event: isinstance(event, kind) and words in event.reason


POINTS = (
    Point("3", "a flush finds an entry gone", statement=_first(lambda row: not row.held, *FLUSHES)),
    Point("3", "a flush waits for a lock", note=_note("blocked", *FLUSHES)),
    Point(
        "3",
        "a note tells a parent that runs elsewhere",
        statement=_first(lambda row: row.running, "wake_parents"),
    ),
    Point("3", "a note wakes a parent that waits", statement=_first(lambda row: row.queues, "wake_parents")),
    Point("4", "a flush gets no answer", event=_event(telemetry.FlushInDoubt)),
    Point("4", "a flush without an answer was committed", statement=_first(lambda row: row.committed, "recorded")),
    Point("4", "a flush without an answer wasn't", statement=_first(lambda row: not row.committed, "recorded")),
    Point("4", "a statement takes effect when its client has given up", note=_note("late")),
    Point("6", "a start without an answer was committed", statement=_rows("started")),
    Point("6", "a start without an answer wasn't", statement=_nothing("started")),
    Point(
        "6",
        "a key is held by another start",
        statement=_fewer("start_keyed"),
    ),
    Point("6", "a keyed start waits for another one", note=_note("blocked", "start_keyed")),
    Point("6", "a workflow is claimed at its birth", statement=_rows("start")),
    Point("7", "a history is loaded behind a claim", statement=_rows("load")),
    Point("7", "a claim goes on where others have come to", statement=_rows("claim_further")),
    Point("7", "a claim gets no answer", unanswered=lambda name: name in ("claim", "claim_further")),
    Point(
        "7",
        "what a lost claim took is released",
        event=_event(telemetry.Reconciled, lambda event: event.released > 0),
    ),
    Point(
        "7",
        "what isn't held any more is dropped",
        event=_event(telemetry.Reconciled, lambda event: event.dropped > 0),
    ),
    Point("8", "a registration gets no answer", unanswered=lambda name: name == "register_worker"),
    Point("8", "a lease ends because no beat is answered", event=_reason(telemetry.LeaseLost, "in time")),
    Point(
        "8",
        "a lease ends because no beat gets through",
        event=_reason(telemetry.LeaseLost, "database: "),
    ),
    Point("8", "a lease has run out by the database's clock", event=_reason(telemetry.LeaseLost, "ran out")),
    Point("8", "a worker is buried", event=_event(telemetry.WorkerBuried)),
    Point(
        "8",
        "a dead worker's workflows are recovered",
        event=_event(telemetry.WorkflowsRecovered),
    ),
    Point("8", "a worker hands over what it holds", statement=_rows("release")),
    Point("9", "a run leaves memory", event=_event(telemetry.WorkflowSuspended)),
    Point(
        "9",
        "a suspension is refused, because something has come",
        statement=_first(lambda row: row.awake, "settle"),
    ),
    Point("9", "a sender meets a run", statement=_rows("send", lambda row: row.was == "entry")),
    Point("9", "a sender wakes who waits for it", statement=_rows("send", lambda row: row.was == "woken")),
    Point(
        "9", "a sender meets one who waits for something else", statement=_rows("send", lambda row: row.was == "told")
    ),
    Point("9", "a sender waits for a flush", note=_note("blocked", "send")),
    Point("9", "a sender finds neither entry nor wait", statement=_nothing("send")),
    Point("9", "a timer wakes", statement=_rows("wake_due")),
    Point("9", "a hint is lost", note=_note("unheard")),
    Point("9", "a run is over, because somebody else has it", event=_reason(telemetry.RunAbandoned, "has taken it")),
    Point("10", "what never ran is cancelled", statement=_rows("cancel", lambda row: row.ended)),
    Point("10", "what has begun is asked to end", statement=_rows("cancel", lambda row: not row.ended)),
    Point("10", "a cancel waits for a flush", note=_note("blocked", "cancel")),
    Point("10", "a cancellation is replayed", statement=_rows("load", lambda row: row.key == CANCELLED)),
    Point("10", "a deadline is due", statement=_rows("due_deadlines")),
    Point("10", "a workflow is terminated", statement=_rows("terminate")),
    Point("12", "a message is there already", statement=_rows("sent")),
    Point("12", "a note stays, because its parent moves", statement=_first(lambda row: row.left > 0, "wake_parents")),
    Point("13", "a transaction without an answer was committed", statement=_rows("recorded_step")),
    Point("13", "a transaction without an answer wasn't", statement=_nothing("recorded_step")),
    Point("13", "a transaction finds its entry gone", statement=_nothing("fence")),
    Point("13", "a transaction that idles is ended", note=_note("idled")),
    Point("15", "attempts survive a crash", statement=_rows("load", lambda row: row.kind == "attempt")),
    Point("15", "a failed workflow is resumed", statement=_rows("resume_ended")),
    Point("15", "a workflow begins anew", statement=_rows("begin_anew")),
)


def reached(
    statements: list[tuple[float, str, str, Any, Any]],
    events: list[tuple[float, str, telemetry.Event]],
    notes: list[tuple[str, str]],
) -> Iterator[Point]:
    """Which of them a seed has reached."""
    for point in POINTS:
        if (
            (point.event is not None and any(point.event(event) for _, _, event in events))
            or (point.note is not None and any(point.note(*note) for note in notes))
            or any(_shows(point, name, params, rows) for _, _, name, params, rows in statements)
        ):
            yield point


def _shows(point: Point, name: str, params: Any, rows: Any) -> bool:
    if isinstance(rows, BaseException):
        return point.unanswered is not None and point.unanswered(name)
    return point.statement is not None and point.statement(name, params, rows)

"""What is done to workflows that are under way or have ended: cancel, terminate, resume, send, delete.

    looked for where it may be -> found: done, and those who must know are told
                               -> not found: what is it? ended, unknown, or moving in this moment: begin again

A verb is one statement, so it happens or it doesn't; sent again after a lost answer, it recognises what it did. Many at
once go in batches, each of which is done by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from perdure import failures
from perdure.errors import DatabaseUnavailable, PerdureError, WorkflowCancelled, WorkflowNotFound, WrongState
from perdure.model.keys import CANCEL
from perdure.store.arrays import BigInts, Texts, Uuids
from perdure.store.pauses import backoff
from perdure.store.statements import SHARD

if TYPE_CHECKING:
    from perdure.session import Session

BATCH = 200
WITH_PARENT = "its parent was cancelled"
_TRIES = 20
_UNFINISHED = frozenset({"pending", "running", "waiting"})
_ENDED_BY_THEMSELVES = frozenset({"success", "error"})
_Reach = Callable[[Sequence[UUID]], Awaitable[Iterable[Any]]]


@dataclass(frozen=True, slots=True)
class Verb:
    """What is done, and what is said where it can't be.

    Attributes:
        reach: Does it to those that it finds, and tells; returns their rows.
        done_already: The statuses in which there is nothing left to do.
        moving: The statuses in which it should have been found, so that it is tried again.
        refusals: For any other status, why it can't be done, and what to do.
    """

    reach: _Reach
    done_already: frozenset[str]
    moving: frozenset[str]
    refusals: dict[str, str]


def cancel(session: Session, reason: str | None) -> Verb:
    """Ask workflows to end: their code gets CancelledError at its await."""
    again = f"{CANCEL}#{uuid4().hex}"
    ended = "it has ended, and there is nothing left to cancel"
    refusals = {"success": ended, "error": ended}
    return Verb(_asking(session, reason or "", again), frozenset({"cancelled"}), _UNFINISHED, refusals)


def cancel_children(session: Session) -> Verb:
    """Ask workflows to end with their parent. Who was asked before isn't asked again."""
    return Verb(_asking(session, WITH_PARENT, None), frozenset({"cancelled", "success", "error"}), _UNFINISHED, {})


def _asking(session: Session, reason: str, again: str | None) -> _Reach:
    said = json.dumps({"by": CANCEL, "reason": reason})
    result = failures.record(WorkflowCancelled(reason))

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        rows = await session.database.fetch("cancel", SHARD, Uuids(ids), CANCEL, said, again, "cancelled", result)
        session.tell(
            queues={row.queue for row in rows if not row.ended},
            asked=[row.workflow_id for row in rows if not row.ended],
            ended=[row.workflow_id for row in rows if row.ended],
        )
        return rows

    return reach


def terminate(session: Session, reason: str | None) -> Verb:
    """End workflows at once, without running any more of their code."""
    result = failures.record(WorkflowCancelled(reason or ""))

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        database = session.database
        reached: list[Any] = []
        states = await database.fetch("states", SHARD, Uuids(ids))
        ids = [row.id for row in states if row.status not in _ENDED_BY_THEMSELVES]  # whose children go on
        left = list(ids)
        for _ in range(2):  # once more: for what they started in this moment
            left += [row.id for row in await database.fetch("descendants", SHARD, Uuids(ids))]
            reached += await database.fetch("terminate", SHARD, Uuids(dict.fromkeys(left)), result) if left else []
            left = []
        ended = [row.workflow_id for row in reached]
        session.tell(asked=ended, ended=ended)
        return reached

    ended = "it has ended, and there is nothing left to terminate"
    return Verb(reach, frozenset({"cancelled"}), _UNFINISHED, {"success": ended, "error": ended})


def resume(session: Session) -> Verb:
    """Let workflows go on from their last checkpoint:

    those that failed or were cancelled, and those that are parked.
    """
    token = uuid4().hex

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        database = session.database
        children = [row.id for row in await database.fetch("failed_children", SHARD, Uuids(ids), WITH_PARENT)]
        if children:  # before their parents look at how they ended
            await apply(session, children, resume(session))
        rows = [*await database.fetch("resume_ended", SHARD, Uuids(ids), token)]
        parked, imported = ("resume_parked", (token,)), ("resume_imported", ())
        for statement, more in (parked, imported, parked):  # once more: what parked between the first two
            left = _without(ids, rows)
            if left:
                rows += await database.fetch(statement, SHARD, Uuids(left), *more)
        session.tell(queues={row.queue for row in rows}, asked=[row.workflow_id for row in rows])
        left = _without(ids, rows)
        if left:  # done by a statement whose answer was lost?
            for row in await database.fetch("resumed", SHARD, Uuids(left), token):
                rows.append(Reached(row.id))
        return rows

    waits = "no step of it is parked; it goes on when what it waits for is there"
    return Verb(
        reach,
        frozenset(),
        frozenset({"cancelled", "error"}),
        {
            "success": "it has succeeded, and there is nothing to resume; start it again, under another key",
            "running": "it runs, and none of its steps is parked; there is nothing to resume",
            "pending": "it is pending already, and goes on as soon as a worker takes it",
            "waiting": waits,
        },
    )


def send(
    session: Session, topic: str, payload: str, id: UUID, sender: UUID | None = None, *, asks: bool = False
) -> Verb:
    """Send a message to a workflow. What was sent before under that id isn't sent again."""

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        (target,) = ids
        message = (Uuids([id]), Uuids([target]), BigInts([0]), Texts([topic]), Texts([payload]), Uuids([sender]))
        rows = await session.database.fetch("send", SHARD, Uuids(ids), *message, asks)
        session.tell(
            queues={row.queue for row in rows if row.was == "woken"},
            asked=[row.workflow_id for row in rows if row.was == "entry"],
        )
        return rows or await session.database.fetch("sent", SHARD, target, id)

    ended = "it has ended, and receives nothing any more"
    return Verb(reach, frozenset(), _UNFINISHED, dict.fromkeys(("success", "error", "cancelled"), ended))


def delete(session: Session) -> Verb:
    """Delete workflows that have ended, with all that they recorded; their keys are free again."""

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        return await session.database.fetch("delete_ended", SHARD, Uuids(ids))

    refusal = "only what has ended can be deleted; cancel or terminate it first"
    return Verb(reach, frozenset(), frozenset({"success", "error", "cancelled"}), dict.fromkeys(_UNFINISHED, refusal))


async def apply(session: Session, ids: Sequence[UUID], verb: Verb) -> dict[UUID, PerdureError | None]:
    """Do it to all of these; returns, for each, why it couldn't be done, or None."""
    outcomes: dict[UUID, PerdureError | None] = {}
    for first in range(0, len(ids), BATCH):
        await _apply(session, list(dict.fromkeys(ids[first : first + BATCH])), verb, outcomes)
    return outcomes


async def _apply(session: Session, left: list[UUID], verb: Verb, outcomes: dict[UUID, PerdureError | None]) -> None:
    for _, pause in zip(range(_TRIES), backoff(0.005, 0.5), strict=False):
        reached = {row.workflow_id for row in await verb.reach(left)}
        outcomes.update(dict.fromkeys(reached))
        left = [id for id in left if id not in reached]
        if not left:
            return
        rows = await session.database.fetch("states", SHARD, Uuids(left))
        statuses = {row.id: row.status for row in rows}
        again: list[UUID] = []
        for id in left:
            if id not in statuses:
                outcomes[id] = WorkflowNotFound(id)
            elif statuses[id] in verb.done_already:
                outcomes[id] = None
            elif statuses[id] is None or statuses[id] in verb.moving:
                again.append(id)
            else:
                outcomes[id] = WrongState(id, statuses[id], verb.refusals[statuses[id]])
        left = again
        if not left:
            return
        await asyncio.sleep(pause)
    for id in left:
        outcomes[id] = DatabaseUnavailable("the workflow moves each time that it is looked at")


@dataclass(frozen=True, slots=True)
class Reached:
    workflow_id: UUID


def _without(ids: Sequence[UUID], rows: Iterable[Any]) -> list[UUID]:
    reached = {row.workflow_id for row in rows}
    return [id for id in ids if id not in reached]

"""What workflows say to each other, as a worker carries it out: messages, and events that others wait for.

An event is a row. Who waits for one writes that down, and then looks whether the event is there; who sets one writes
it, and then looks who waits. Each writes before it looks, in statements of their own, so at least one of them sees the
other. Who waits is told by a message, whose id follows from the event and the waiter: told twice, by a step that ran
twice, it gets one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from perdure import management
from perdure.errors import PerdureError, WorkflowNotFound, WrongState
from perdure.model.keys import answer_name, event_topic
from perdure.store.arrays import Uuids
from perdure.store.programs import NewWorkflow, Started
from perdure.store.statements import SHARD

if TYPE_CHECKING:
    from perdure.session import Session

_FINAL = ("success", "error", "cancelled")


class Exchange:
    """Carries out what workflows and their steps ask for."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def post(self, target: UUID, topic: str, payload: str, id: UUID, sender: UUID) -> None:
        """Send a message; one that was sent before under that id isn't sent again.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended.
        """
        verb = management.send(self._session, topic, payload, id, sender)
        outcomes = await management.apply(self._session, [target], verb)
        if (refusal := outcomes[target]) is not None:
            raise refusal

    async def publish(self, owner: UUID, name: str, payload: str, id: UUID) -> None:
        """Set an event of a workflow, and tell those who wait for it; the same id is set once."""
        database = self._session.database
        while not await database.fetch("set_event", SHARD, owner, name, id, payload):
            if await database.fetch("event_set", SHARD, owner, id):
                break
        self._session.announced(owner)
        rows = await database.fetch("event_waiters", SHARD, owner, name)
        for row in rows:
            try:
                await self.post(row.waiter_id, event_topic(owner, name), payload, uuid5(id, str(row.waiter_id)), owner)
            except (WorkflowNotFound, WrongState):
                continue  # it doesn't wait any more
        if rows:
            await database.fetch("forget_event_waiters", SHARD, owner, name, Uuids(row.waiter_id for row in rows))

    async def start(self, new: NewWorkflow) -> Started:
        """Start a workflow under a key, or find the one that holds it.

        Raises:
            KeyConflict: It was, and the start asked to be told.
        """
        (started,) = await self._session.starter.start([new])
        return started

    async def cancel(self, ids: Iterable[UUID]) -> None:
        """Ask children to end with their parent; those that have ended stay as they are."""
        await management.apply(self._session, list(ids), management.cancel_children(self._session))

    async def result(self, id: UUID, waiter: UUID) -> tuple[str, str] | None:
        """How a workflow ended: status and payload; None: it hasn't.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It is an ancestor of who asks, so it may wait for that one.
        """
        database = self._session.database
        rows = await database.fetch("child_results", SHARD, Uuids([id]))
        if not rows:
            raise WorkflowNotFound(id)
        if rows[0].status is not None:
            return rows[0].status, rows[0].payload
        ancestors = {row.id for row in await database.fetch("ancestors", SHARD, waiter)}
        if id == waiter or id in ancestors:
            advice = "it is this workflow itself, or an ancestor that may wait for it; wait for an event of it instead"
            raise WrongState(id, "unfinished", advice)
        return None

    async def set_attributes(self, id: UUID, attributes: str) -> None:
        """Set attributes of a workflow, given as a JSON object; others stay."""
        await self._session.database.fetch("set_attributes", SHARD, id, attributes)

    async def begin_anew(
        self, worker_id: UUID, id: UUID, epoch: int, input: str, version: str, *, was_told: bool
    ) -> str | None:
        """Let a workflow begin again; returns its queue. None: that worker doesn't hold it any more."""
        rows = await self._session.database.fetch("begin_anew", SHARD, worker_id, id, epoch, input, version, was_told)
        return str(rows[0].queue) if rows else None

    async def stream_end(self, owner: UUID, name: str) -> tuple[int, int]:
        """The numbers of the next entry, and of the next part, of a stream."""
        (end,) = await self._session.database.fetch("stream_end", SHARD, owner, name)
        return end.number, end.part

    async def refuse(self, id: UUID, question: UUID, answer: str) -> None:
        """Answer a question that the workflow's code isn't to see."""
        name = answer_name(question)
        await self._session.database.fetch("refuse_message", SHARD, id, question, name, uuid5(question, name), answer)
        self._session.announced(id)

    async def subscribe(self, owner: UUID, name: str, waiter: UUID) -> str | None:
        """The payload of an event; None: it isn't there, and the waiter will get a message when it is.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended without that event.
        """
        found = await latest(self._session, owner, name)
        if found is None:
            await self._session.database.fetch("await_event", SHARD, owner, name, waiter)
            found = await latest(self._session, owner, name)
        return found


async def latest(session: Session, owner: UUID, name: str) -> str | None:
    """The payload of an event of a workflow; None: it isn't there yet.

    Raises:
        WorkflowNotFound: There is no such workflow.
        WrongState: It has ended without that event.
    """
    refusal: PerdureError | None = None
    for _ in range(2):  # once more: an event may have come between the two looks, and the end behind it
        rows = await session.database.fetch("event", SHARD, owner, name)
        if rows:
            return str(rows[0].payload)
        if refusal is not None:
            raise refusal
        refusal = await _over(session, owner, name)
        if refusal is None:
            return None
    raise AssertionError("the second look raises")


async def _over(session: Session, owner: UUID, name: str) -> PerdureError | None:
    states = await session.database.fetch("states", SHARD, Uuids([owner]))
    if not states:
        return WorkflowNotFound(owner)
    if states[0].status in _FINAL:
        lack = "answering" if name.startswith("$answer") else f"setting event {name!r}"
        return WrongState(owner, states[0].status, f"it has ended without {lack}")
    return None

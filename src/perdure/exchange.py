"""What workflows say to each other, as a worker carries it out: messages, and events that others wait for.

An event is a row. Who waits for one writes that down, and then looks whether the event is there; who sets one writes
it, and then looks who waits. Each writes before it looks, in statements of their own, so at least one of them sees the
other. Who waits is told by a message, whose id follows from the event and the waiter: told twice, by a step that ran
twice, it gets one.
"""

from __future__ import annotations

from uuid import UUID, uuid5

from perdure import management
from perdure.errors import PerdureError, WorkflowNotFound, WrongState
from perdure.model.keys import answer_name, event_topic
from perdure.session import Session
from perdure.store.arrays import Uuids
from perdure.store.statements import SHARD

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
        rows = await database.fetch("event_waiters", SHARD, owner, name)
        for row in rows:
            try:
                await self.post(row.waiter_id, event_topic(owner, name), payload, uuid5(id, str(row.waiter_id)), owner)
            except (WorkflowNotFound, WrongState):
                continue  # it doesn't wait any more
        if rows:
            await database.fetch("forget_event_waiters", SHARD, owner, name, Uuids(row.waiter_id for row in rows))

    async def refuse(self, id: UUID, question: UUID, answer: str) -> None:
        """Answer a question that the workflow's code isn't to see."""
        name = answer_name(question)
        await self._session.database.fetch("refuse_message", SHARD, id, question, name, uuid5(question, name), answer)

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

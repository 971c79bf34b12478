"""A handle: one workflow, seen from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast
from uuid import UUID, uuid5

from typing_extensions import TypeForm, TypeVar

from perdure import exchange, failures, management, streams
from perdure.annotations import ANY
from perdure.authoring.context import CURRENT, Context
from perdure.authoring.events import valued
from perdure.authoring.messages import dumped
from perdure.codec import Shape, shape
from perdure.errors import (
    ReplayMismatch,
    ResultTimeout,
    SerializationError,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
)
from perdure.failures import Catalogue
from perdure.model.ids import new_id
from perdure.model.keys import answer_name, check_name
from perdure.model.records import Result, StepInfo, WorkflowInfo, info
from perdure.model.statuses import Status
from perdure.store.arrays import Uuids
from perdure.store.pauses import backoff
from perdure.store.statements import SHARD
from perdure.streams import StreamEntry

if TYPE_CHECKING:
    from perdure.session import Session

R_co = TypeVar("R_co", covariant=True, default=Any)
T = TypeVar("T", default=Any)

_FIRST_SECONDS = 0.004
_LOOK_SECONDS = 0.25


class Owner(Protocol):
    """What a handle needs of its client."""

    def session(self) -> Session: ...
    @property
    def catalogue(self) -> Catalogue: ...
    def decoded(self, text: str) -> str: ...
    def encoded(self, text: str) -> str: ...


class Handle(Generic[R_co]):
    """One workflow: ask it for its result, its status, its steps.

    Attributes:
        id: Its id, a UUIDv7.
        key: The key that it was started under, if any.
        started: Whether the start that gave this handle made it; False where it attached to an existing one.
    """

    def __init__(
        self,
        owner: Owner,
        id: UUID,
        shape: Shape,
        *,
        key: str | None = None,
        started: bool = True,
        is_known: bool = True,
    ) -> None:
        self._owner = owner
        self._shape = shape
        self._is_known = is_known
        self._is_local = False
        self.id = id
        self.key = key
        self.started = started

    async def result(self, *, timeout: timedelta | None = None) -> R_co:
        """Wait until the workflow has ended, and return what it returned. In a workflow's own code it is recorded.

        Args:
            timeout: How long to wait; 0 asks whether it has ended.

        Raises:
            ResultTimeout: It hasn't ended in time; it goes on.
            WorkflowFailed: It failed; errors that the app knows, and built-in ones, are raised as themselves.
            WorkflowCancelled: It was cancelled.
            WorkflowNotFound: There is no such workflow.
        """
        context = CURRENT.get()
        if context is not None and context.is_workflow:
            return await self._result_in(context, timeout)
        results = self._owner.session().results
        if timeout is not None and timeout <= timedelta(0):
            found = await results.look(self.id)
            if found is None:
                raise ResultTimeout(self.id)
            return self._outcome(found)
        waiting = results.wait(self.id, is_known=self._is_known, is_local=self._is_local)
        if timeout is None:
            return self._outcome(await waiting)
        limit = asyncio.timeout(timeout.total_seconds())
        try:
            async with limit:
                result = await waiting
        except TimeoutError:
            if limit.expired():
                raise ResultTimeout(self.id) from None
            raise
        return self._outcome(result)

    async def _result_in(self, context: Context, timeout: timedelta | None, key: str | None = None) -> R_co:
        """The same in a workflow's own code; with the key of the call that started it, as if it had been awaited."""
        try:
            async with context.limit(timeout) if timeout is not None else nullcontext():
                key, status, payload = await context.outcome_of(self.id, key)
        except TimeoutError:  # of the limit; what the child failed with is raised below
            raise ResultTimeout(self.id) from None
        if status != "success":
            raise failures.of_child(self._owner.catalogue, payload, key)
        return self._outcome(Result(self.id, status, payload))

    async def status(self) -> Status:
        """Where the workflow stands.

        Raises:
            WorkflowNotFound: There is no such workflow.
        """
        return (await self.describe()).status

    async def describe(self) -> WorkflowInfo:
        """Its row of the view `workflows`.

        Raises:
            WorkflowNotFound: There is no such workflow.
        """
        rows = await self._owner.session().database.fetch("describe", Uuids([self.id]))
        if not rows:
            raise WorkflowNotFound(self.id)
        return info(WorkflowInfo, rows[0], self._owner.decoded)

    async def steps(self) -> Sequence[StepInfo]:
        """Its rows of the view `workflow_steps`, in the order in which its code got the outcomes.

        Raises:
            WorkflowNotFound: There is no such workflow.
        """
        database = self._owner.session().database
        rows = await database.fetch("steps", self.id)
        if not rows and not await database.fetch("started", SHARD, Uuids([self.id])):
            raise WorkflowNotFound(self.id)
        return [info(StepInfo, row, self._owner.decoded) for row in rows]

    async def cancel(self, *, reason: str | None = None) -> None:
        """Ask the workflow to end: its code gets CancelledError at its await, and may clean up, in steps.

        What never ran ends at once. Cancelling twice is the same as once.

        Args:
            reason: Why; it stands in the error that callers get.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended by itself.
        """
        await self._apply(management.cancel(self._owner.session(), reason))

    async def terminate(self, *, reason: str | None = None) -> None:
        """End the workflow at once: no more of its code runs, not even to clean up. Its worker can record nothing more.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended by itself.
        """
        await self._apply(management.terminate(self._owner.session(), reason))

    async def resume(self) -> None:
        """Let the workflow go on from its last checkpoint, after it failed, was cancelled, or has a parked step.

        The result, the cancellation, and the failure that the result came from are set aside; everything else that was
        recorded stays, and is replayed. Its deadline, if it had one, is no more.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: There is nothing to resume.
        """
        await self._apply(management.resume(self._owner.session()))

    async def send(self, topic: str, value: Any, *, idempotency_key: str | None = None) -> None:
        """Send a message to the workflow, which gets it by `recv(topic)`. When this returns, it is there.

        Args:
            topic: What the message is about; messages of a topic come in the order in which they were sent.
            value: JSON, or an instance of a class that `recv` names as `type`.
            idempotency_key: A second message of that key to this workflow is not sent. In a step, the default is the
                same for all attempts.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended.
            SerializationError: JSON can't carry the value.
            DatabaseUnavailable: No answer for `connect_timeout`; sending again under the same key is safe.
        """
        session = self._owner.session()
        check_name("topic", topic)
        text = dumped(value, f"a message of topic {topic!r}", session.settings.max_payload)
        payload = self._owner.encoded(text)
        context = CURRENT.get()
        if idempotency_key is None and context is not None:
            idempotency_key = context.start_key("send")
        id = new_id() if idempotency_key is None else uuid5(self.id, idempotency_key)
        await self._apply(management.send(session, topic, payload, id))

    async def ask(self, topic: str, value: Any, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None) -> T:
        """Ask the workflow something, which it answers in an `answering(topic)` block; returns the answer.

        Args:
            topic: What the question is about.
            value: The question, as in `send`.
            type: What the answer is.
            timeout: How long to wait for it; the question stays.

        Raises:
            Refused: The workflow's validator refused the question.
            Unanswered: The workflow took it, and gave no answer. What else its block failed with is raised as itself,
                or as `WorkflowFailed`.
            TimeoutError: There was no answer in time.
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended, or ended without taking the question.
            SerializationError: JSON can't carry the question, or the answer doesn't fit `type`.
        """
        session = self._owner.session()
        check_name("topic", topic)
        text = dumped(value, f"a question of topic {topic!r}", session.settings.max_payload)
        id = new_id()
        await self._apply(management.send(session, topic, self._owner.encoded(text), id, asks=True))
        answer = json.loads(await self._event(answer_name(id), timeout))
        if "error" in answer:
            raise self._owner.catalogue.rebuild(answer["error"], WorkflowFailed)
        return valued(json.dumps(answer["value"]), topic, type)

    async def _event(self, name: str, timeout: timedelta | None) -> str:
        """The payload of an event of the workflow, as soon as it is there."""
        session = self._owner.session()
        seconds = None if timeout is None else timeout.total_seconds()
        if seconds is not None and seconds <= 0:
            found = await exchange.latest(session, self.id, name)
            if found is None:
                raise TimeoutError
            return self._owner.decoded(found)
        async with asyncio.timeout(seconds):
            for pause in backoff(_FIRST_SECONDS, _LOOK_SECONDS):
                found = await exchange.latest(session, self.id, name)
                if found is not None:
                    return self._owner.decoded(found)
                await session.event_hint(self.id, pause)
        raise AssertionError("backoff never ends")

    async def get_event(self, name: str, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None) -> T:
        """The value that the workflow set last under that name, as soon as there is one.

        Args:
            name: The name that the workflow gave to `set_event`.
            type: What the value is.
            timeout: How long to wait; 0 asks whether it is there.

        Raises:
            TimeoutError: It wasn't set in time.
            WorkflowNotFound: There is no such workflow.
            WrongState: It has ended without setting it.
            SerializationError: The value doesn't fit `type`.
        """
        return valued(await self._event(check_name("event", name), timeout), name, type)

    async def read_stream(
        self, name: str, *, type: TypeForm[T] = ANY, offset: int = 0
    ) -> AsyncIterator[StreamEntry[T]]:
        """The entries of a stream of the workflow, as they come, until it has ended.

        A step that runs again writes anew: what it had written is left out, and a reader who got it before gets one
        `StreamReset`.

        Args:
            name: The name that the workflow gave to `write_stream`.
            type: What the values are.
            offset: Where to begin: 0, or one more than the offset of the last entry that you have.

        Raises:
            WorkflowNotFound: There is no such workflow.
            SerializationError: A value doesn't fit `type`.
        """
        given = shape(type)

        def load(payload: str) -> T:
            return cast("T", given.load(self._owner.decoded(payload)))

        entries = streams.read(self._owner.session(), self.id, check_name("stream", name), offset, load)
        async for entry in entries:
            yield entry

    async def delete(self) -> None:
        """Delete the workflow, which must have ended, with all that it recorded; its key is free again.

        Raises:
            WorkflowNotFound: There is no such workflow.
            WrongState: It hasn't ended.
        """
        await self._apply(management.delete(self._owner.session()))

    async def _apply(self, verb: management.Verb) -> None:
        outcomes = await management.apply(self._owner.session(), [self.id], verb)
        if (refusal := outcomes[self.id]) is not None:
            raise refusal

    def _outcome(self, result: Result) -> R_co:
        if result.status != "success":
            error = self._owner.catalogue.rebuild(result.payload, WorkflowFailed)
            if result.status == "cancelled" and not isinstance(error, WorkflowCancelled):
                error = WorkflowCancelled(str(result.payload))  # somebody else's row
            raise error
        try:
            return cast("R_co", self._shape.load(self._owner.decoded(result.payload)))
        except (ValueError, SerializationError) as error:
            raise ReplayMismatch("$result", "a result that doesn't fit its annotation", str(error)) from error

    def __repr__(self) -> str:
        return f"<handle {self.id}>"

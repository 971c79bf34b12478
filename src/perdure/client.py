"""The client: starts workflows and looks at them, without knowing their code.

What talks to the database is imported when something is to be said to it: a program that only declares workflows, or
asks for help, doesn't wait for that.
"""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, overload
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from perdure import forking, management, telemetry
from perdure.annotations import ANY
from perdure.authoring.context import CURRENT, Context
from perdure.authoring.workflows import Invocation, Workflow
from perdure.codec import Codec, Shape, shape
from perdure.config import Settings
from perdure.errors import WorkflowNotFound, WrongPlace, WrongState
from perdure.failures import Catalogue
from perdure.handle import Handle
from perdure.model.ids import new_ids
from perdure.model.records import WorkflowInfo, info
from perdure.model.statuses import Status
from perdure.starts import Json, Start, attributes_text, aware, prepare, taken
from perdure.store import programs
from perdure.store.arrays import Texts, Uuids
from perdure.store.pauses import backoff
from perdure.store.programs import NewWorkflow, OnConflict, Program, Started
from perdure.store.statements import SHARD, statements

if TYPE_CHECKING:
    from perdure.session import Session

R = TypeVar("R")
T = TypeVar("T", default=Any)

_PAGE = 200
_UNFINISHED = (Status.PENDING, Status.RUNNING, Status.WAITING)
_FINAL = (Status.SUCCESS, Status.ERROR, Status.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which workflows to list."""

    status: Status | None = None
    name: str | None = None
    queue: str | None = None
    key_prefix: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    attributes: str | None = None
    parent: UUID | None = None


class Client:
    """Verbs for callers that need not know the code. Does no I/O until its first verb.

    Args:
        database_url: A PostgreSQL URL. None: `PERDURE_DATABASE_URL`, else the embedded server.
        schema: The schema that holds perdure's tables.
        connect_timeout: For how long a verb tries to reach the database before it raises `DatabaseUnavailable`.
        pool_size: How many connections may be open at once.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        schema: str = "perdure",
        connect_timeout: timedelta = timedelta(seconds=30),
        pool_size: int = 4,
    ) -> None:
        self.settings = Settings(
            database_url=database_url, schema=schema, connect_timeout=connect_timeout, pool_size=pool_size
        )
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = weakref.WeakKeyDictionary()
        self._pid = os.getpid()

    # --- starting --------------------------------------------------------------------------------------------------

    async def start(
        self,
        invocation: Invocation[R],
        /,
        *,
        key: str | None = None,
        on_conflict: OnConflict = "attach",
        queue: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        delay: timedelta | None = None,
        start_at: datetime | None = None,
        timeout: timedelta | None = None,
        attributes: Json | None = None,
        detached: bool = False,
        connection: Any = None,
    ) -> Handle[R]:
        """Start a workflow. When this returns, it will run to its end, as long as PostgreSQL keeps its data.

        In a workflow's own code it starts a child, in the background, and is recorded: a replay finds the same child.

        Args:
            invocation: What to run: `checkout(42)`, or `Invocation("checkout", 42)` where the code isn't known.
            key: Makes starting idempotent: a second start under the same key finds the first one's workflow.
            on_conflict: What to do about a key that is taken: "attach" to its workflow, "raise", or "replace_finished".
            queue: Where it waits; None: the workflow's own queue.
            priority: Higher runs first.
            partition: The tenant or group that it counts for.
            delay: Not before this long from now.
            start_at: Not before this instant.
            timeout: How long it may take, from when it may start; then its code is cancelled, and it ends in error
                (`DeadlineExceeded`). None: what the workflow says.
            attributes: A JSON object to find it by.
            detached: Of a child: it goes on when its parent is cancelled, or reaches its deadline.
            connection: A caller's own connection: the start commits or rolls back with its transaction.

        Raises:
            InvalidArguments: The arguments don't fit the workflow's signature.
            SerializationError: JSON can't carry an argument.
            KeyConflict: The key is taken (`on_conflict="raise"`).
            DatabaseUnavailable: No answer for `connect_timeout`; starting again under the same key is safe.
        """
        new = self._new(
            invocation,
            key=key,
            on_conflict=on_conflict,
            queue=queue,
            priority=priority,
            partition=partition,
            delay=delay,
            start_at=start_at,
            timeout=timeout,
            attributes=attributes,
        )
        context = CURRENT.get()
        if context is not None and context.is_workflow:
            return await self._start_child(context, invocation, new, detached, connection)
        if connection is not None:
            await self.session().database.prepare()
            program = self._program([new])
            from perdure.store import foreign

            (started,) = await foreign.run_async(connection, program, statements(self.settings.schema))
            await self._report_differences([new], [started])
            return self._started(invocation, new, started)
        session = self.session()
        (started,) = await session.starter.start([new])
        handle = self._started(invocation, new, started)
        handle._is_local = session.has_resident and started.started
        await self._report_differences([new], [started])
        return handle

    async def start_many(
        self,
        invocations: Iterable[Invocation[R] | Start[R]],
        /,
        *,
        queue: str | None = None,
        connection: Any = None,
    ) -> list[Handle[R]]:
        """Start many workflows, in as few statements as possible; returns their handles in order.

        All arguments are checked before anything is written. Batches of 1000 commit each by itself, two at a time; in a
        transaction of the caller's (`connection=`) all of them commit together.
        """
        starts = [each if isinstance(each, Start) else Start(each) for each in invocations]
        news = self._new_many(starts, queue)
        if not news:
            return []
        context = CURRENT.get()
        if context is not None and context.is_workflow:
            return [
                await self._start_child(context, each.invocation, new, False, connection)
                for each, new in zip(starts, news, strict=True)
            ]
        if connection is not None:
            await self.session().database.prepare()
            program = self._program(news)
            from perdure.store import foreign

            outcomes = await foreign.run_async(connection, program, statements(self.settings.schema))
        else:
            outcomes = await self.session().starter.start(news)
        await self._report_differences(news, outcomes)
        return [
            self._started(each.invocation, new, outcome)
            for each, new, outcome in zip(starts, news, outcomes, strict=True)
        ]

    async def run(
        self,
        invocation: Invocation[R],
        /,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        timeout: timedelta | None = None,
        detached: bool = False,
    ) -> R:
        """Start a workflow and wait for its result; raises what `start` and `Handle.result` raise.

        `timeout` is the workflow's own, as in `start`: then it is cancelled, and `DeadlineExceeded` is raised.
        In a workflow's own code it runs a child, as `await checkout(42)` does, with options.
        """
        handle = await self.start(
            invocation, key=key, queue=queue, priority=priority, partition=partition, timeout=timeout, detached=detached
        )
        context = CURRENT.get()
        if context is None or not context.is_workflow:
            return await handle.result()
        return await handle._result_in(context, None, invocation.key)

    async def _start_child(
        self, context: Context, invocation: Invocation[R], new: NewWorkflow, detached: bool, connection: Any
    ) -> Handle[R]:
        if connection is not None or not context.is_home(self.settings):
            raise WrongPlace(
                f"workflow {new.name!r} can't be started as a child in another database, or a transaction of yours; "
                "start it in a step"
            )
        id, started = await context.start_child(new, invocation.key, detached=detached)
        return self._started(invocation, new, Started(id=id, started=started))

    async def start_or_send(
        self,
        invocation: Invocation[R],
        topic: str,
        value: Any,
        /,
        *,
        key: str,
        idempotency_key: str | None = None,
    ) -> Handle[R]:
        """Send a message to the workflow that holds a key, and start it first if there is none, or if it has ended.

        When this returns, the message is there. If it fails in between, the workflow may be started without it: call it
        again, with an `idempotency_key=` if the message must not be sent twice.

        Args:
            invocation: What to start.
            topic: What the message is about.
            value: As in `Handle.send`.
            key: The key; one workflow of that name at a time holds it.
            idempotency_key: As in `Handle.send`: a second message of that key to this workflow is not sent.

        Raises:
            InvalidArguments: The arguments don't fit the workflow's signature.
            SerializationError: JSON can't carry an argument, or the value.
            DatabaseUnavailable: No answer for `connect_timeout`.
        """
        for pause in backoff():
            handle = await self.start(invocation, key=key, on_conflict="replace_finished")
            try:
                await handle.send(topic, value, idempotency_key=idempotency_key)
            except (WrongState, WorkflowNotFound):  # it has ended in between
                await asyncio.sleep(pause)
            else:
                return handle
        raise AssertionError("backoff never ends")

    # --- looking ---------------------------------------------------------------------------------------------------

    def handle(self, id: UUID, /, type: TypeForm[T] = ANY) -> Handle[T]:
        """The handle of a workflow whose id is known; `type` says what its result is. Does no I/O."""
        if not isinstance(id, UUID):
            raise TypeError(f"handle() takes a UUID, not {id!r}; write handle(UUID(...))")
        return Handle(self, id, shape(type), is_known=False)

    @overload
    async def find(self, workflow: Workflow[..., R], /, *, key: str) -> Handle[R] | None: ...
    @overload
    async def find(self, workflow: str, /, *, key: str) -> Handle[Any] | None: ...
    async def find(self, workflow: Workflow[..., R] | str, /, *, key: str) -> Handle[R] | None:
        """The workflow that holds a key; None: none does."""
        name = workflow if isinstance(workflow, str) else workflow.name
        (row,) = await self.session().database.fetch("holders", SHARD, Texts([name]), Texts([key]))
        if row.id is None:
            return None
        return Handle(self, row.id, self._result_shape(name, workflow), key=key, started=False)

    async def workflows(
        self,
        *,
        status: Status | None = None,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        parent: UUID | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[WorkflowInfo]:
        """Workflows, newest first by id; read page by page while you iterate.

        Args:
            status: Only those that stand there.
            name: Only workflows of that name.
            queue: Only those of that queue.
            key_prefix: Only those whose key begins so.
            since: Only those created at that instant or later.
            until: Only those created before that instant.
            attributes: Only those whose attributes contain these.
            parent: Only the children of that workflow.
            limit: At most so many.
        """
        wanted = replace(
            self._filter(name, queue, key_prefix, since, until, attributes),
            status=None if status is None else Status(status),
            parent=parent,
        )
        left = limit
        before: UUID | None = None
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            ids = await self._page(wanted, before, size)
            if not ids:
                return
            before = ids[-1]
            rows = await self.session().database.fetch("describe", Uuids(ids))
            found = {row.id: row for row in rows}
            for id in ids:
                if id in found:
                    yield info(WorkflowInfo, found[id], self.decoded)
            if len(ids) < size:
                return
            left = None if left is None else left - len(ids)

    def _filter(
        self,
        name: str | None,
        queue: str | None,
        key_prefix: str | None,
        since: datetime | None,
        until: datetime | None,
        attributes: Json | None,
    ) -> Filter:
        return Filter(
            name=name,
            queue=queue,
            key_prefix=key_prefix,
            since=aware("since", since),
            until=aware("until", until),
            attributes=None if attributes is None else attributes_text(attributes, self.settings.max_payload),
        )

    async def _page(self, wanted: Filter, before: UUID | None, size: int) -> list[UUID]:
        more: tuple[UUID, ...] = ()
        if wanted.parent is not None:
            statement, more = "page_children", (wanted.parent,)
        elif wanted.status in (Status.PENDING, Status.RUNNING, Status.WAITING):
            statement = "page_active"
        else:
            statement = "page_failed" if wanted.status is Status.ERROR else "page_all"
        rows = await self.session().database.fetch(
            statement, SHARD, before, wanted.name, wanted.queue, wanted.key_prefix, wanted.since, wanted.until,
            wanted.attributes, None if wanted.status is None else wanted.status.value, size, *more,
        )  # fmt: skip
        return [row.id for row in rows]

    # --- managing --------------------------------------------------------------------------------------------------

    async def cancel_many(
        self,
        *,
        reason: str | None = None,
        status: Status | None = None,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        dry_run: bool = False,
    ) -> list[UUID]:
        """Cancel all workflows that a filter lets through and that haven't ended; returns their ids.

        Args:
            reason: Why; it stands in their error.
            status: Only those that stand there; None: pending, running and waiting ones.
            name: As in `workflows`, and so the other filters.
            queue: As in `workflows`.
            key_prefix: As in `workflows`.
            since: As in `workflows`.
            until: As in `workflows`.
            attributes: As in `workflows`.
            dry_run: Only say which ones.
        """
        wanted = self._filter(name, queue, key_prefix, since, until, attributes)
        verb = management.cancel(self.session(), reason)
        return await self._apply(verb, wanted, _UNFINISHED if status is None else (status,), dry_run=dry_run)

    async def terminate_many(
        self,
        *,
        reason: str | None = None,
        status: Status | None = None,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        dry_run: bool = False,
    ) -> list[UUID]:
        """Terminate all workflows that a filter lets through and that haven't ended; as `cancel_many` otherwise."""
        wanted = self._filter(name, queue, key_prefix, since, until, attributes)
        verb = management.terminate(self.session(), reason)
        return await self._apply(verb, wanted, _UNFINISHED if status is None else (status,), dry_run=dry_run)

    async def resume_many(
        self,
        *,
        status: Status = Status.ERROR,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        dry_run: bool = False,
    ) -> list[UUID]:
        """Resume all workflows that a filter lets through; by default those that failed. As `cancel_many` otherwise.

        `status=Status.WAITING` are those with parked steps.
        """
        wanted = self._filter(name, queue, key_prefix, since, until, attributes)
        return await self._apply(management.resume(self.session()), wanted, (status,), dry_run=dry_run)

    async def delete_many(
        self,
        *,
        status: Status | None = None,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        dry_run: bool = False,
    ) -> list[UUID]:
        """Delete all workflows that a filter lets through and that have ended; as `cancel_many` otherwise."""
        wanted = self._filter(name, queue, key_prefix, since, until, attributes)
        statuses = _FINAL if status is None else (status,)
        return await self._apply(management.delete(self.session()), wanted, statuses, dry_run=dry_run)

    async def fork(
        self, id: UUID, /, *, after: str | None = None, patch: Mapping[str, Any] | None = None
    ) -> Handle[Any]:
        """Start a new workflow that goes on from a step of another one, which isn't touched.

        What the other one had recorded up to that step is copied, and isn't done again; from there on the code runs.
        `forked_from` says where it comes from. A child that still runs belongs to the other one: the fork starts
        its own.

        Args:
            id: The other one, whatever its status.
            after: The key of the step (`handle.steps()` has them). None: the last one of the patch; without one, the
                last that it has recorded, but for failures that it failed from. "$input": only its input is copied.
            patch: What takes the place of recorded outputs, by the keys of the steps.

        Raises:
            WorkflowNotFound: There is no such workflow.
            UnknownStep: It has no such step, or one of the patch isn't copied.
            SerializationError: JSON can't carry a value of the patch, or it isn't what the step returns.
        """
        patches = self._patches(patch)
        new = await forking.fork(self.session(), id, after, patches, self.version)
        return Handle(self, new, shape(ANY))

    async def rewind(
        self, id: UUID, /, *, after: str | None = None, patch: Mapping[str, Any] | None = None
    ) -> Handle[Any]:
        """Let a workflow that has ended go on from a step, in place.

        What it had recorded behind that step, its result, and what the patch replaces are kept as history, and don't
        count any more. Messages that it had received behind the step are there to be received again.

        Args:
            id: The workflow.
            after: As in `fork`.
            patch: As in `fork`.

        Raises:
            WrongState: It hasn't ended.
            WorkflowNotFound: There is no such workflow.
            UnknownStep: It has no such step, or one of the patch doesn't stay.
            SerializationError: As in `fork`.
        """
        await forking.rewind(self.session(), id, after, self._patches(patch))
        return Handle(self, id, shape(ANY))

    def _patches(self, patch: Mapping[str, Any] | None) -> dict[str, str]:
        limit = self.settings.max_payload
        return {
            key: self.encoded(self._output_shape(key).dump(value, f"the output of step {key!r}", limit))
            for key, value in (patch or {}).items()
        }

    async def prune(self, *, keep: timedelta | None = None, name: str | None = None, dry_run: bool = False) -> int:
        """Delete what has been over for longer than it is kept, now; workers do the same by themselves, now and then.

        Args:
            keep: How long to keep what has ended, whatever apps and workflows say; None: what they say.
            name: Only workflows of that name.
            dry_run: Only count.

        Returns:
            How many workflows were (or would be) deleted.
        """
        if keep is not None and keep < timedelta(0):
            raise ValueError(f"keep={keep} is in the past; use 0 or more")
        from perdure.engine.maintenance import FIRST, prune_chunk

        database, deleted = self.session().database, 0
        after: UUID | None = FIRST
        while after is not None:
            after, count = await prune_chunk(database, after, keep=keep, name=name, dry_run=dry_run)
            deleted += count
        return deleted

    async def export(self, id: UUID, /) -> Json:
        """A workflow with all that it recorded, as JSON: for a bug report, a test, another database.

        Its messages, events and streams come along.

        Raises:
            WorkflowNotFound: There is no such workflow.
        """
        from perdure import transfer

        return await transfer.exported(self.session().database, id)

    async def import_(self, exported: Json, /) -> Handle[Any]:
        """Bring in what `export` gave. What hadn't ended waits for an operator: `resume` lets it go on, here.

        Raises:
            SerializationError: It isn't what `export` gives.
            KeyConflict: The workflow is there already, or its key is taken.
        """
        from perdure import transfer

        return self.handle(await transfer.imported(self.session().database, exported))

    async def _apply(
        self, verb: management.Verb, wanted: Filter, statuses: Iterable[Status], *, dry_run: bool
    ) -> list[UUID]:
        """Do it to all that the filter lets through; returns those to which it was (or would be) done."""
        done: list[UUID] = []
        for status in statuses:
            before: UUID | None = None
            while ids := await self._page(replace(wanted, status=Status(status)), before, _PAGE):
                before = ids[-1]
                if dry_run:
                    done += ids
                else:
                    outcomes = await management.apply(self.session(), ids, verb)
                    done += [id for id in ids if outcomes[id] is None]
        return list(dict.fromkeys(done))

    # --- life ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def session(self) -> Session:
        """What this client has for the running event loop; made at first use. A forked child makes its own."""
        loop = asyncio.get_running_loop()
        if (context := CURRENT.get()) is not None:
            context.check_verb()
        if self._pid != os.getpid():
            self._sessions, self._pid = weakref.WeakKeyDictionary(), os.getpid()
        session = self._sessions.get(loop)
        if session is None:
            from perdure.session import Session

            session = self._sessions[loop] = Session(self.settings)
        return session

    def move(self, settings: Settings) -> Callable[[], None]:
        """Talk to another database from now on, with sessions of its own; returns what goes back. For tests."""
        former, self.settings = self.settings, settings
        sessions, self._sessions = self._sessions, weakref.WeakKeyDictionary()

        def back() -> None:
            self.settings, self._sessions = former, sessions

        return back

    def sessions(self) -> list[tuple[asyncio.AbstractEventLoop, Session]]:
        """What it has, for each event loop."""
        return list(self._sessions.items())

    # --- what an app knows better ----------------------------------------------------------------------------------

    @property
    def catalogue(self) -> Catalogue:
        """The classes of errors that can be raised as themselves."""
        return _BUILT_IN

    @property
    def codec(self) -> Codec | None:
        """What stands between payloads and the database."""
        return None

    @property
    def version(self) -> str | None:
        """The version of the code that starts workflows."""
        return None

    def encoded(self, text: str) -> str:
        """A payload as it is stored."""
        return text if self.codec is None else self.codec.encode(text)

    def decoded(self, text: str) -> str:
        """A payload as it was before it was stored."""
        return text if self.codec is None else self.codec.decode(text)

    def _result_shape(self, name: str, workflow: Workflow[..., Any] | str | None) -> Any:
        return workflow.shape if isinstance(workflow, Workflow) else shape(ANY)

    def _output_shape(self, key: str) -> Shape:
        """What a step of that key returns, as far as the code is known."""
        return shape(ANY)

    # --- making a start ---------------------------------------------------------------------------------------------

    def _new(self, invocation: Invocation[Any], **options: Any) -> NewWorkflow:
        """Check everything, before anything is written; the options are those of `starts.prepare`."""
        return prepare(
            invocation, encoded=self.encoded, version=self.version, limit=self.settings.max_payload, **options
        )

    def _new_many(self, starts: Sequence[Start[Any]], queue: str | None) -> list[NewWorkflow]:
        """The same for many."""
        for each in starts:
            taken(each.invocation)  # also those behind one that is refused
        ids = new_ids(len(starts))  # in order, so that they run in the order in which they were given
        return [
            self._new(
                each.invocation,
                id=id,
                key=each.key,
                queue=queue,
                priority=each.priority,
                partition=each.partition,
                delay=each.delay,
                attributes=each.attributes,
            )
            for each, id in zip(starts, ids, strict=True)
        ]

    def _program(self, news: Sequence[NewWorkflow]) -> Program[list[Started]]:
        """The starts as a program for a caller's own connection."""
        plain = [new for new in news if new.is_plain]
        other = [new for new in news if not new.is_plain]
        outcomes: dict[UUID, Started] = {}
        if plain:
            for new, started in zip(plain, (yield from programs.start(plain)), strict=True):
                outcomes[new.id] = started
        if other:
            found = yield from programs.start_keyed(other, lock_timeout=None)
            for new, outcome in zip(other, found, strict=True):
                if not isinstance(outcome, Started):
                    raise outcome
                outcomes[new.id] = outcome
        return [outcomes[new.id] for new in news]

    def _started(self, invocation: Invocation[R], new: NewWorkflow, started: Started) -> Handle[R]:
        result_shape = self._result_shape(new.name, invocation.workflow)
        return Handle(self, started.id, result_shape, key=new.key, started=started.started)

    async def _report_differences(self, news: Sequence[NewWorkflow], outcomes: Sequence[Started]) -> None:
        """A start that attached to a workflow with other arguments is worth a line in the log."""
        attached = [(new, outcome.id) for new, outcome in zip(news, outcomes, strict=True) if not outcome.started]
        if not attached:
            return
        rows = await self.session().database.fetch("describe", Uuids([id for _, id in attached]))
        inputs = {row.id: json.loads(self.decoded(row.input)) for row in rows if row.input is not None}
        for new, id in attached:
            if id in inputs and inputs[id] != json.loads(self.decoded(new.input)):
                telemetry.emit(telemetry.KeyAttached(name=new.name, key=new.key or "", workflow_id=id))


_BUILT_IN = Catalogue()

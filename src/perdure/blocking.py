"""The same verbs without `await`, for code without an event loop: Django, Flask, scripts.

One thread of the process has an event loop on which these verbs run, for all callers. So they share a pool, and starts
of many threads go to the database together. A forked child gets a thread of its own.

In a `def` step, which runs in a thread, `send` and `set_event` of this module do what those of `perdure` do elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, overload
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from perdure.annotations import ANY
from perdure.authoring import events, messages, streams
from perdure.authoring.context import required
from perdure.authoring.messages import Addressed
from perdure.authoring.workflows import Invocation, Workflow
from perdure.client import Client
from perdure.errors import WrongPlace
from perdure.handle import Handle
from perdure.model.records import StepInfo, WorkflowInfo
from perdure.model.statuses import Status
from perdure.starts import Json, Start, taken
from perdure.store.programs import NewWorkflow, OnConflict
from perdure.store.statements import statements
from perdure.streams import StreamEntry

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True, default=Any)
T = TypeVar("T", default=Any)


class Portal:
    """The thread with the event loop; made at the first call."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as a forked child must: the thread, and perhaps the lock's owner, stayed with the parent."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, R], verb: str) -> R:
        """Run a coroutine there, and wait for it here.

        Raises:
            WrongPlace: This thread has a running loop, which would stand still meanwhile.
        """
        try:
            _refuse_loop(verb)
        except WrongPlace:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="perdure-blocking", daemon=True).start()
            return self._loop


PORTAL = Portal()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PORTAL.reset)


class BlockingHandle(Generic[R_co]):
    """One workflow: ask it for its result, its status, its steps.

    Attributes:
        id: Its id, a UUIDv7.
        key: The key that it was started under, if any.
        started: Whether the start that gave this handle made it; False where it attached to an existing one.
    """

    def __init__(self, handle: Handle[R_co]) -> None:
        self.handle = handle
        self.id: UUID = handle.id
        self.key: str | None = handle.key
        self.started: bool = handle.started

    def result(self, *, timeout: timedelta | None = None) -> R_co:
        return PORTAL.run(self.handle.result(timeout=timeout), "handle.result()")

    def status(self) -> Status:
        return PORTAL.run(self.handle.status(), "handle.status()")

    def describe(self) -> WorkflowInfo:
        return PORTAL.run(self.handle.describe(), "handle.describe()")

    def steps(self) -> Sequence[StepInfo]:
        return PORTAL.run(self.handle.steps(), "handle.steps()")

    def cancel(self, *, reason: str | None = None) -> None:
        PORTAL.run(self.handle.cancel(reason=reason), "handle.cancel()")

    def terminate(self, *, reason: str | None = None) -> None:
        PORTAL.run(self.handle.terminate(reason=reason), "handle.terminate()")

    def resume(self) -> None:
        PORTAL.run(self.handle.resume(), "handle.resume()")

    def send(self, topic: str, value: Any, *, idempotency_key: str | None = None) -> None:
        PORTAL.run(self.handle.send(topic, value, idempotency_key=idempotency_key), "handle.send()")

    def ask(self, topic: str, value: Any, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None) -> T:
        return PORTAL.run(self.handle.ask(topic, value, type=type, timeout=timeout), "handle.ask()")

    def get_event(self, name: str, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None) -> T:
        return PORTAL.run(self.handle.get_event(name, type=type, timeout=timeout), "handle.get_event()")

    def read_stream(self, name: str, *, type: TypeForm[T] = ANY, offset: int = 0) -> Iterator[StreamEntry[T]]:
        entries = self.handle.read_stream(name, type=type, offset=offset)

        async def following() -> StreamEntry[T] | None:
            return await anext(entries, None)

        while (entry := PORTAL.run(following(), "handle.read_stream()")) is not None:
            yield entry

    def delete(self) -> None:
        PORTAL.run(self.handle.delete(), "handle.delete()")

    def __repr__(self) -> str:
        return repr(self.handle)


class BlockingApp:
    """The verbs of an app (or of a client), for code without an event loop."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def start(
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
    ) -> BlockingHandle[R]:
        taken(invocation)
        if connection is not None:
            new = self._client._new(
                invocation, key=key, on_conflict=on_conflict, queue=queue, priority=priority, partition=partition,
                delay=delay, start_at=start_at, timeout=timeout, attributes=attributes,
            )  # fmt: skip
            (handle,) = self._start_on(connection, [invocation], [new], "app.start()")
            return handle
        starting = self._client.start(
            invocation, key=key, on_conflict=on_conflict, queue=queue, priority=priority, partition=partition,
            delay=delay, start_at=start_at, timeout=timeout, attributes=attributes, detached=detached,
        )  # fmt: skip
        return BlockingHandle(PORTAL.run(starting, "app.start()"))

    def start_many(
        self, invocations: Iterable[Invocation[R] | Start[R]], /, *, queue: str | None = None, connection: Any = None
    ) -> list[BlockingHandle[R]]:
        starts = [each if isinstance(each, Start) else Start(each) for each in invocations]
        for each in starts:
            taken(each.invocation)
        if connection is not None and starts:
            news = self._client._new_many(starts, queue)
            return self._start_on(connection, [each.invocation for each in starts], news, "app.start_many()")
        starting = self._client.start_many(starts, queue=queue)
        return [BlockingHandle(handle) for handle in PORTAL.run(starting, "app.start_many()")]

    def _start_on(
        self, connection: Any, invocations: Sequence[Invocation[R]], news: Sequence[NewWorkflow], verb: str
    ) -> list[BlockingHandle[R]]:
        """Start them on a caller's connection, in the caller's thread: it may wait for somebody's transaction there."""
        PORTAL.run(self._prepare(), verb)
        program = self._client._program(news)
        from perdure.store import foreign

        outcomes = foreign.run_blocking(connection, program, statements(self._client.settings.schema))
        PORTAL.run(self._client._report_differences(news, outcomes), verb)
        return [
            BlockingHandle(self._client._started(invocation, new, started))
            for invocation, new, started in zip(invocations, news, outcomes, strict=True)
        ]

    def run(
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
        taken(invocation)
        running = self._client.run(
            invocation, key=key, queue=queue, priority=priority, partition=partition, timeout=timeout, detached=detached
        )
        return PORTAL.run(running, "app.run()")

    def start_or_send(
        self,
        invocation: Invocation[R],
        topic: str,
        value: Any,
        /,
        *,
        key: str,
        idempotency_key: str | None = None,
    ) -> BlockingHandle[R]:
        taken(invocation)
        sending = self._client.start_or_send(invocation, topic, value, key=key, idempotency_key=idempotency_key)
        return BlockingHandle(PORTAL.run(sending, "app.start_or_send()"))

    def handle(self, id: UUID, /, type: TypeForm[T] = ANY) -> BlockingHandle[T]:
        return BlockingHandle(self._client.handle(id, type))

    @overload
    def find(self, workflow: Workflow[..., R], /, *, key: str) -> BlockingHandle[R] | None: ...
    @overload
    def find(self, workflow: str, /, *, key: str) -> BlockingHandle[Any] | None: ...
    def find(self, workflow: Workflow[..., R] | str, /, *, key: str) -> BlockingHandle[R] | None:
        found: Handle[R] | None = PORTAL.run(self._client.find(workflow, key=key), "app.find()")
        return None if found is None else BlockingHandle(found)

    def workflows(
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
    ) -> Iterator[WorkflowInfo]:
        pages = self._client.workflows(
            status=status, name=name, queue=queue, key_prefix=key_prefix, since=since, until=until,
            attributes=attributes, parent=parent, limit=limit,
        )  # fmt: skip

        async def following() -> WorkflowInfo | None:
            return await anext(pages, None)

        while (found := PORTAL.run(following(), "app.workflows()")) is not None:
            yield found

    def cancel_many(
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
        doing = self._client.cancel_many(
            reason=reason, status=status, name=name, queue=queue, key_prefix=key_prefix, since=since, until=until,
            attributes=attributes, dry_run=dry_run,
        )  # fmt: skip
        return PORTAL.run(doing, "app.cancel_many()")

    def terminate_many(
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
        doing = self._client.terminate_many(
            reason=reason, status=status, name=name, queue=queue, key_prefix=key_prefix, since=since, until=until,
            attributes=attributes, dry_run=dry_run,
        )  # fmt: skip
        return PORTAL.run(doing, "app.terminate_many()")

    def resume_many(
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
        doing = self._client.resume_many(
            status=status, name=name, queue=queue, key_prefix=key_prefix, since=since, until=until,
            attributes=attributes, dry_run=dry_run,
        )  # fmt: skip
        return PORTAL.run(doing, "app.resume_many()")

    def delete_many(
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
        doing = self._client.delete_many(
            status=status, name=name, queue=queue, key_prefix=key_prefix, since=since, until=until,
            attributes=attributes, dry_run=dry_run,
        )  # fmt: skip
        return PORTAL.run(doing, "app.delete_many()")

    def fork(
        self, id: UUID, /, *, after: str | None = None, patch: Mapping[str, Any] | None = None
    ) -> BlockingHandle[Any]:
        return BlockingHandle(PORTAL.run(self._client.fork(id, after=after, patch=patch), "app.fork()"))

    def rewind(
        self, id: UUID, /, *, after: str | None = None, patch: Mapping[str, Any] | None = None
    ) -> BlockingHandle[Any]:
        return BlockingHandle(PORTAL.run(self._client.rewind(id, after=after, patch=patch), "app.rewind()"))

    def prune(self, *, keep: timedelta | None = None, name: str | None = None, dry_run: bool = False) -> int:
        return PORTAL.run(self._client.prune(keep=keep, name=name, dry_run=dry_run), "app.prune()")

    def export(self, id: UUID, /) -> Json:
        return PORTAL.run(self._client.export(id), "app.export()")

    def import_(self, exported: Json, /) -> BlockingHandle[Any]:
        return BlockingHandle(PORTAL.run(self._client.import_(exported), "app.import_()"))

    def close(self) -> None:
        PORTAL.run(self._client.close(), "app.close()")

    async def _prepare(self) -> None:
        await self._client.session().database.prepare()

    def __enter__(self) -> BlockingApp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def send(target: Addressed | UUID, topic: str, value: Any, /) -> None:
    _carry_out(messages.send(target, topic, value), "send()")


def set_event(name: str, value: Any, /) -> None:
    _carry_out(events.set_event(name, value), "set_event()")


def write_stream(name: str, value: Any, /) -> None:
    _carry_out(streams.write_stream(name, value), "write_stream()")


def _carry_out(coroutine: Coroutine[Any, Any, None], verb: str) -> None:
    """Let the worker's loop do it, for the `def` step that runs in this thread.

    Raises:
        NotInWorkflow: No step runs in it.
        WrongPlace: It has a running loop, which would stand still meanwhile.
    """
    try:
        loop = required(f"blocking {verb}", "call it inside a `def` step").loop
        _refuse_loop(verb)
    except BaseException:
        coroutine.close()
        raise
    asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def _refuse_loop(verb: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise WrongPlace(f"blocking {verb} was called in a running event loop; use 'await {verb}' there")


def _document(mirror: type[Any], original: type[Any]) -> None:
    """A verb says the same in both worlds: written once, where it is awaited."""
    for name, method in vars(mirror).items():
        if not name.startswith("_") and callable(method) and hasattr(original, name):
            method.__doc__ = getattr(original, name).__doc__


_document(BlockingApp, Client)
_document(BlockingHandle, Handle)
send.__doc__, set_event.__doc__ = messages.send.__doc__, events.set_event.__doc__
write_stream.__doc__ = streams.write_stream.__doc__

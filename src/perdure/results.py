"""Waiting for results: one look serves all who wait, and hints say when to look.

A result is read from the database, or handed over by a worker of this process after it is durable. Polling is the
truth: rarely where hints arrive, with growing pauses where they don't. What a look finds is for those who waited when
it was sent: who comes later may have begun the workflow anew, and mustn't get what it came to before. Whoever waits
says so now and then (`waiting`), so that workers elsewhere send hints only while somebody does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from uuid import UUID

import psycopg

from perdure.errors import WorkflowNotFound
from perdure.model.records import Result
from perdure.store.arrays import Uuids
from perdure.store.database import Database, Interrupted
from perdure.store.statements import SHARD

_MOST = 1000
_FIRST_SECONDS = 0.005
_DEAF_SECONDS = 0.25
_HEARING_SECONDS = 1.0
_LOCAL_SECONDS = 0.5
_WAITING_SECONDS = 3.0
_MOST_ENDED = 4096
_RECHECK_SECONDS = 5.0


class Results:
    """The results that callers of this process wait for."""

    def __init__(self, database: Database, *, say_waiting: Callable[[], None], hears: Callable[[], bool]) -> None:
        self._database = database
        self._say_waiting = say_waiting
        self._hears = hears
        self._waiters: dict[UUID, list[asyncio.Future[Result]]] = {}
        self._unseen: set[UUID] = set()  # those that may not exist
        self._seen: set[UUID] = set()  # those that were there, and may be deleted
        self._rechecked_at = float("-inf")
        self._local: set[UUID] = set()
        self._ended: dict[UUID, None] = {}  # the last ones that ended here, and nobody waited for
        self._look = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._said_at = float("-inf")

    async def wait(self, id: UUID, *, is_known: bool = False, is_local: bool = False) -> Result:
        """The result of a workflow, as soon as there is one.

        Args:
            id: The workflow.
            is_known: It is there for certain.
            is_local: A worker of this process has it, and will say when it ends: there is no hurry to look, unless it
                has said so already.

        Raises:
            WorkflowNotFound: There is no such workflow.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(id, [])
        waiters.append(future)
        if not is_known:
            self._unseen.add(id)
        if is_local and id not in self._ended:
            self._local.add(id)
        else:
            self._look.set()
        if self._polling is None:
            self._polling = asyncio.ensure_future(self._poll())
        try:
            return await future
        finally:
            waiters.remove(future)
            if not waiters and self._waiters.get(id) is waiters:
                self._forget(id)

    async def look(self, id: UUID) -> Result | None:
        """The result of a workflow; None: it hasn't ended.

        Raises:
            WorkflowNotFound: There is no such workflow.
            DatabaseUnavailable: No answer for `connect_timeout`.
        """
        for row in await self._database.fetch("results", SHARD, Uuids([id])):
            return Result(row.workflow_id, row.status, row.payload)
        if not await self._database.fetch("started", SHARD, Uuids([id])):
            raise WorkflowNotFound(id)
        return None

    def hint(self, id: UUID) -> None:
        """That workflow has ended, somebody says."""
        if id in self._waiters:
            self._local.discard(id)
            self._look.set()

    def deliver(self, result: Result) -> None:
        """A worker of this process has made it durable."""
        if result.workflow_id not in self._waiters:
            self._ended[result.workflow_id] = None
            if len(self._ended) > _MOST_ENDED:
                del self._ended[next(iter(self._ended))]
            return
        self._tell(result, self._waiters[result.workflow_id])

    def _tell(self, result: Result, waiters: Iterable[asyncio.Future[Result]]) -> None:
        for future in waiters:
            if not future.done():
                future.set_result(result)
        if all(future.done() for future in self._waiters.get(result.workflow_id, ())):
            self._forget(result.workflow_id)
        else:
            self._look.set()

    async def close(self) -> None:
        """Nobody waits any more: who still does is cancelled."""
        for future in [each for waiters in self._waiters.values() for each in waiters]:
            future.cancel()
        if polling := self._polling:
            polling.cancel()
            await asyncio.wait({polling})

    def _forget(self, id: UUID) -> None:
        self._waiters.pop(id, None)
        self._unseen.discard(id)
        self._seen.discard(id)
        self._local.discard(id)

    # --- polling ---------------------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        """Look for results, as long as anybody waits for one."""
        pause = _FIRST_SECONDS
        try:
            while self._waiters:
                if await self._happened(pause):
                    pause = _FIRST_SECONDS
                else:
                    self._local.clear()  # it has taken long; perhaps another worker has it by now
                    pause = min(pause * 2, _HEARING_SECONDS if self._hears() else _DEAF_SECONDS)
                if any(id not in self._local for id in self._waiters):
                    await self._look_now()
                    self._say()
        finally:
            self._polling = None

    async def _happened(self, seconds: float) -> bool:
        if self._local:
            seconds = max(seconds, _LOCAL_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await self._look.wait()
        except TimeoutError:
            return False
        self._look.clear()
        return True

    async def _look_now(self) -> None:
        ids = [id for id in self._waiters if id not in self._local]
        now = asyncio.get_running_loop().time()
        is_due = now - self._rechecked_at > _RECHECK_SECONDS
        if is_due:
            self._rechecked_at = now
        for first in range(0, len(ids), _MOST):
            chunk = ids[first : first + _MOST]
            asked = {id: tuple(self._waiters[id]) for id in chunk if id in self._waiters}
            try:
                for row in await self._database.attempt("results", SHARD, Uuids(asked)):
                    self._tell(Result(row.workflow_id, row.status, row.payload), asked[row.workflow_id])
                await self._check([id for id in chunk if id in self._waiters and (is_due or id in self._unseen)])
            except (Interrupted, psycopg.Error):
                return  # the next look will tell
            except Exception as error:  # looking again wouldn't help, and those who ask later must not wait for ever
                self._tell_all(chunk, error)

    async def _check(self, ids: list[UUID]) -> None:
        """Tell those who wait for what isn't there."""
        if not ids:
            return
        there = {row.id for row in await self._database.attempt("started", SHARD, Uuids(ids))}
        for id in ids:
            if id in there:
                self._unseen.discard(id)
                self._seen.add(id)
            elif id in self._unseen or id in self._seen:  # not: in a caller's transaction that is still open
                self._tell_all([id], WorkflowNotFound(id))

    def _tell_all(self, ids: list[UUID], error: Exception) -> None:
        for id in ids:
            for future in self._waiters.get(id, ()):
                if not future.done():
                    future.set_exception(error)
            self._forget(id)

    def _say(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._waiters and now - self._said_at > _WAITING_SECONDS:
            self._said_at = now
            self._say_waiting()

"""The clock of a test: the database's own time, which stands still until the test puts it forward.

`perdure.now()` is replaced by a function that reads a row, in the schema of the test. What counts time in memory (short
waits, the worker's idea of the database's time) is told. The worker's own lease moves along: it is alive, and its
heartbeat would have renewed it; leases of others run out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from perdure.session import Session
from perdure.store.statements import SHARD, Statements
from perdure.worker import Worker

PATIENCE = timedelta(seconds=10)


class Settling(Protocol):
    """Waits until nothing can move before the clock does."""

    def __call__(self, *, timeout: timedelta) -> Awaitable[None]: ...


class Clock:
    """The database's time, in a test."""

    def __init__(self, session: Session, worker: Callable[[], Worker | None], idle: Settling) -> None:
        self._database = session.database
        self._statements = Statements(session.settings.schema, "perdure.testing")
        self._worker = worker
        self._idle = idle

    async def install(self) -> None:
        """Make the time stand still, in this schema."""
        await self._execute("make_clock")
        await self._execute("set_clock", SHARD)
        await self._execute("stop_clock")
        await self._execute("heed_beats")
        await self._execute("watch_beats")

    async def now(self) -> datetime:
        """What it says."""
        (row,) = await self._database.fetch("clock")
        now: datetime = row.now
        return now

    async def advance(self, delay: timedelta, *, settle: bool = True, timeout: timedelta = PATIENCE) -> None:
        """Put it forward by so much; returns when everything that is due by then has happened.

        It stops at whatever becomes due on the way, and waits until nothing can move before it goes on: so each
        workflow sees the time that it waited for, and a loop of sleeps runs as often as it would.

        Args:
            delay: By how much.
            settle: False: jump at once, whatever goes on; for tests in which a step is to run on meanwhile.
            timeout: How long, really, each rest may take to come.

        Raises:
            TimeoutError: Something doesn't come to rest; says what.
        """
        if delay < timedelta(0):
            raise ValueError(f"advance() got {delay}, and time goes on only; use a delay of 0 or more")
        now = await self.now()
        target = now + delay
        if not settle:
            return await self._put_forward(now, target)
        await self._idle(timeout=timeout)
        while now < target:
            due = await self.next_due()
            to = target if due is None else min(due, target)
            await self._put_forward(now, to)
            await self._idle(timeout=timeout)
            now = to
        return None

    async def next_due(self) -> datetime | None:
        """When the next thing is due, later than now; None: nothing waits for the clock."""
        worker = self._worker()
        (row,) = await self._execute("next_due", SHARD, None if worker is None else worker.worker_id)
        seconds = None if worker is None else worker.alarms.next_due
        in_memory = None if seconds is None else row.now + timedelta(seconds=seconds)
        known = [max(due, row.now + timedelta(microseconds=1)) for due in (row.due_at, in_memory) if due is not None]
        return min(known, default=None)

    async def state(self, names: Any) -> Any:
        """What in the database could move by itself, as a row of booleans, and the wakes that the worker should see."""
        worker = self._worker()
        (row,) = await self._execute("at_rest", SHARD, None if worker is None else worker.worker_id, names)
        return row

    async def _put_forward(self, now: datetime, to: datetime) -> None:
        worker = self._worker()
        await self._execute("put_forward", SHARD, to, None if worker is None else worker.worker_id)
        if worker is not None:
            worker.clock_shifted(now, to)

    async def _execute(self, name: str, *params: object) -> Sequence[Any]:
        async def once() -> Sequence[Any]:
            async with self._database.connection() as connection:
                return await self._database.execute(connection, self._statements[name], params)

        return await self._database.persist(once)

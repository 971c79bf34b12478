"""Ways to force an interleaving: locks held from outside, answers that are lost, runs that only take notes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from perdure import App, Invocation
from perdure.model.ids import new_id
from perdure.model.records import Checkpoint
from perdure.store import programs
from perdure.store.database import Database, Interrupted, Row
from perdure.store.programs import NewWorkflow
from perdure.store.statements import SHARD

Sql = Callable[..., list[Any]]


class FakeRun:
    """A run as the writer sees it: notes what it is told."""

    def __init__(self, id: UUID, worker_id: UUID, epoch: int = 1) -> None:
        self.id = id
        self.name = "flow"
        self.worker_id = worker_id
        self.epoch = epoch
        self.recoveries = 0
        self.started_at = datetime.now(UTC)
        self.deadline: datetime | None = None
        self.parent_id: UUID | None = None
        self.queues: set[str] = set()
        self.entries = 0
        self.durable = 0
        self.result: tuple[str, str] | None = None
        self.loss: str | None = None
        self.refusal: str | None = None
        self.is_suspended = False
        self.is_awoken = False
        self._told = asyncio.Event()

    def written(self, checkpoints: int) -> None:
        self.durable += checkpoints
        self._told.set()

    def streamed(self, entries: int) -> None:
        self.entries += entries
        self._told.set()

    def born(self, queues: set[str]) -> None:
        self.queues |= queues
        self._told.set()

    def ended(self, status: str, payload: str) -> None:
        assert self.result is None, "the end was acknowledged twice"
        self.result = (status, payload)
        self._told.set()

    def suspended(self) -> None:
        self.is_suspended = True
        self._told.set()

    def awoken(self) -> None:
        self.is_awoken = True
        self._told.set()

    def lost(self, reason: str) -> None:
        self.loss = reason
        self._told.set()

    def refused(self, reason: str) -> None:
        self.refusal = reason
        self._told.set()

    async def told(self) -> None:
        """Wait until the writer has said something, once since the last call."""
        async with asyncio.timeout(10):
            await self._told.wait()
        self._told.clear()


def outcome(key: str, payload: str = "1", position: int = 1) -> Checkpoint:
    return Checkpoint(key, "step", position, "success", payload)


@dataclass
class _Plan:
    kind: str
    left: int
    with_rows: bool = False
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    leave: asyncio.Event = field(default_factory=asyncio.Event)


class FaultyDatabase(Database):
    """Loses requests and answers of chosen statements; and lets a lost request arrive late."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans: dict[str, list[_Plan]] = {}
        self.late: list[tuple[str, tuple[object, ...]]] = []
        self.sent: list[str] = []

    def lose_request(self, statement: str, times: int = 1) -> _Plan:
        """It doesn't arrive, and nobody knows (it may arrive late: `arrive`)."""
        return self._plan(statement, "request", times)

    def lose_answer(self, statement: str, times: int = 1, *, with_rows: bool = False) -> _Plan:
        """It takes effect, and nobody is told. `with_rows`: answers without any rows are let through."""
        return self._plan(statement, "answer", times, with_rows=with_rows)

    def hold_answer(self, statement: str, *, with_rows: bool = False) -> _Plan:
        """It takes effect; its answer comes when `leave` is set."""
        return self._plan(statement, "hold", 1, with_rows=with_rows)

    def hold_request(self, statement: str) -> _Plan:
        """It is sent when `leave` is set."""
        return self._plan(statement, "before", 1)

    def _plan(self, statement: str, kind: str, times: int, *, with_rows: bool = False) -> _Plan:
        plan = _Plan(kind, times, with_rows)
        self.plans.setdefault(statement, []).append(plan)
        return plan

    async def attempt(self, name: str, /, *params: object) -> Sequence[Row]:
        self.sent.append(name)
        plan = next((plan for plan in self.plans.get(name, ()) if plan.left > 0), None)
        if plan is None:
            return await super().attempt(name, *params)
        if plan.kind in ("answer", "hold"):
            rows = await super().attempt(name, *params)
            if plan.with_rows and not rows:
                return rows
            plan.left -= 1
            plan.happened.set()
            if plan.kind == "answer":
                raise Interrupted("the answer was lost", outcome_unknown=True)
            await plan.leave.wait()
            return rows
        plan.left -= 1
        if plan.kind == "request":
            self.late.append((name, params))
            plan.happened.set()
            raise Interrupted("the request was lost", outcome_unknown=True)
        plan.happened.set()
        await plan.leave.wait()
        return await super().attempt(name, *params)

    async def arrive(self) -> Sequence[Row]:
        """The oldest request that was lost arrives after all."""
        name, params = self.late.pop(0)
        return await super().attempt(name, *params)


class LeaseDatabases:
    """The databases that leases make for themselves; `plans` are applied at their birth."""

    def __init__(self) -> None:
        self.made: list[FaultyDatabase] = []
        self.plans: list[Callable[[FaultyDatabase], object]] = []

    def make(self, *args: Any, **options: Any) -> FaultyDatabase:
        database = FaultyDatabase(*args, **options)
        self.made.append(database)
        for plan in self.plans:
            plan(database)
        return database


async def register(database: Database, *, lease: float = 30.0, id: UUID | None = None) -> UUID:
    """A worker's row, alive for so many seconds."""
    id = id or new_id()
    await database.attempt("register_worker", SHARD, id, "app", "1", "host", 1, None, '["flow"]', 100, lease, False)
    return id


async def start(database: Database, count: int = 1, *, worker_id: UUID | None = None, queue: str = "q") -> list[UUID]:
    """So many workflows, pending, or running under that worker at epoch 1; in the order of their ids."""
    news = [NewWorkflow(id=new_id(), name="flow", queue=queue, input="{}") for _ in range(count)]
    for new in news:
        # One by one: each is enqueued later than the one before it.
        await database.attempt("start", *programs.start_params([new], worker_id))
    return [new.id for new in news]


@asynccontextmanager
async def locked(url: str, schema: str, text: str, *params: object) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A transaction of somebody else's that has run this, and stays open in the block; or ends by `commit()` in it."""
    async with await psycopg.AsyncConnection.connect(url, options=f"-c search_path={schema}") as connection:
        await connection.execute(text, params or None)
        yield connection
        await connection.rollback()


@asynccontextmanager
async def flush_blocked(
    url: str, schema: str, id: UUID, key: str = "step"
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Somebody's open transaction has that checkpoint: a flush gets its entries' locks, and then waits; in the block.

    (A table lock would stop it earlier: before it has locked its entries.)
    """
    inserting = (
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
        "VALUES (1, %s, %s, 'step', 1, 'success', 'null', now())"
    )
    async with locked(url, schema, inserting, id, key) as connection:
        yield connection


async def until(sql: Sql, text: str, *params: object, timeout: float = 20) -> Any:
    """Wait until a query's first value is true: for what the server does, of which there are no events."""
    deadline = time.monotonic() + timeout
    while True:
        rows = await asyncio.to_thread(sql, text, *params)
        if rows and rows[0][0]:
            return rows[0][0]
        assert time.monotonic() < deadline, f"not within {timeout} s: {text}"
        await asyncio.sleep(0.005)


async def waits_for_a_lock(sql: Sql, schema: str, count: int = 1) -> None:
    """Wait until so many statements on this schema wait for a lock."""
    await until(
        sql,
        "SELECT count(*) >= %s FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND position(%s IN query) > 0",
        count,
        schema,
    )


async def start_claimed_at_birth(
    app: App, faulty: FaultyDatabase, sql: Sql, worker_id: UUID
) -> tuple[int, asyncio.Task[Any], _Plan]:
    """Start `flow(number)` so that its worker here holds it from its birth; the answer is on its way.

    Whether a start may be claimed at birth depends on what the worker does at the moment; so it is tried again, with
    another number, until one was.
    """
    plan = faulty.hold_answer("start", with_rows=True)  # the rows are those that are claimed
    for number in range(1, 100):
        starting = asyncio.ensure_future(app.start(Invocation("flow", number)))
        held = asyncio.ensure_future(plan.happened.wait())
        await asyncio.wait({starting, held}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        if held.done():
            assert sql("SELECT count(*) FROM queue_entries WHERE worker_id = %s", worker_id) == [(1,)]
            return number, starting, plan
        held.cancel()
        await (await starting).result(timeout=timedelta(seconds=10))
    raise AssertionError("no start was ever claimed at birth")


class Gate:
    """Where a step's body stands until the test lets it through; counts who came."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.left: list[Any] = []
        self.most = 0
        self._inside = 0
        self._arrived = asyncio.Event()
        self._open = asyncio.Event()

    async def pass_through(self, who: Any = None) -> None:
        self.came.append(who)
        self._inside += 1
        self.most = max(self.most, self._inside)
        self._arrived.set()
        try:
            await self._open.wait()
        finally:
            self._inside -= 1
            self.left.append(who)

    async def has(self, count: int) -> None:
        """Wait until so many have come."""
        async with asyncio.timeout(15):
            while len(self.came) < count:
                self._arrived.clear()
                await self._arrived.wait()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

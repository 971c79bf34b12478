"""PROTOCOLS §13: transactional steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from perdure import App, StepFailed, step, telemetry
from perdure.store.statements import SHARD

from .support import FaultyDatabase, Gate, Sql, locked, register, until, waits_for_a_lock

Connect = Callable[[], Any]

LEASE = timedelta(seconds=1)
LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)


class Lossy(psycopg.AsyncConnection[Any]):
    """Loses the acknowledgement of a commit, or the commit itself, as often as it is told."""

    lose: list[str] = []  # noqa: RUF012 - set anew by each test

    @asynccontextmanager
    async def transaction(self, *args: Any, **options: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        what = ""
        async with super().transaction(*args, **options) as transaction:
            yield transaction
            what = self.lose.pop(0) if self.lose else ""
            if what == "commit":
                await self.close()
                raise psycopg.OperationalError("the connection went before the commit")
        if what == "acknowledgement":
            await self.close()
            raise psycopg.OperationalError("the connection went after the commit")


@pytest.fixture
def connect(database_url: str, schema: str, sql: Sql, app: App) -> Connect:
    """Connections for transactional steps; the table of their effects is there."""
    sql("CREATE TABLE effects (note text NOT NULL)")
    Lossy.lose = []

    @asynccontextmanager
    async def connection() -> AsyncIterator[Lossy]:
        options = f"-c search_path={schema}"
        made = await Lossy.connect(database_url, autocommit=True, options=options)
        try:
            yield made
        finally:
            await made.close()

    return connection


def effects(sql: Sql) -> list[str]:
    return [note for (note,) in sql("SELECT note FROM effects ORDER BY note")]


async def test_a_transactional_step_whose_workflow_was_taken_over_is_rolled_back(
    app: App, sql: Sql, connect: Connect, database: FaultyDatabase, events: Any
) -> None:
    gate = Gate()

    @app.transaction(using=connect)
    async def put(connection: Any) -> str:
        await connection.execute("INSERT INTO effects VALUES ('zombie')")
        await gate.pass_through()
        return "put"

    @app.workflow
    async def flow() -> str:
        return await put()

    heir = await register(database, lease=600)
    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await gate.has(1)
        sql("UPDATE queue_entries SET worker_id = %s, epoch = epoch + 1", heir)
        gate.open()
        await events.wait_for(telemetry.RunAbandoned, lambda event: event.workflow_id == handle.id)
    assert effects(sql) == []
    assert sql("SELECT count(*) FROM workflow_steps") == [(0,)]
    assert sql("SELECT worker_id, epoch FROM queue_entries") == [(heir, 2)]


async def test_a_recovery_passes_by_a_transaction_that_is_behind_its_fence(
    app: App, sql: Sql, connect: Connect, schema: str, database_url: str, database: FaultyDatabase
) -> None:
    @app.transaction(using=connect)
    async def put(connection: Any) -> str:
        await connection.execute("INSERT INTO effects VALUES ('once')")
        return "put"

    gate = Gate()

    @step
    async def before() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> str:
        await before()
        return await put()

    async with app.worker(lease=LONG) as worker:
        handle = await app.start(flow())
        await gate.has(1)
        hostile = (
            "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at) "
            "VALUES (1, %s, 'put', 'step', 9, 'success', now())"
        )
        async with locked(database_url, schema, hostile, handle.id):
            gate.open()
            await waits_for_a_lock(sql, schema)  # its checkpoint waits; the fence holds the entry
            assert list(await database.attempt("recover", SHARD, worker.worker_id, 10)) == []
        assert await handle.result(timeout=SOON) == "put"
    assert effects(sql) == ["once"]


@pytest.mark.parametrize("lost", [["acknowledgement"], ["commit"], ["commit", "acknowledgement"]], ids="+".join)
async def test_a_commit_without_an_answer_takes_effect_exactly_once(
    app: App, sql: Sql, connect: Connect, lost: list[str]
) -> None:
    bodies: list[int] = []

    @app.transaction(using=connect)
    async def put(connection: Any) -> int:
        bodies.append(1)
        await connection.execute("INSERT INTO effects VALUES ('once')")
        return len(bodies)

    @app.workflow
    async def flow() -> int:
        return await put()

    Lossy.lose = list(lost)
    async with app.worker(lease=LONG):
        value = await app.run(flow())
    assert effects(sql) == ["once"]
    assert len(bodies) == 1 + lost.count("commit")
    assert value == len(bodies), "what was committed is what the code got"
    assert sql("SELECT output::int, attempts FROM workflow_steps") == [(value, 1)], "that is no failed attempt"


async def test_an_acknowledgement_lost_after_somebody_took_over_ends_the_run_and_the_outcome_counts(
    app: App, sql: Sql, connect: Connect, events: Any, faulty: FaultyDatabase, database: FaultyDatabase
) -> None:
    bodies: list[int] = []

    @app.transaction(using=connect)
    async def put(connection: Any) -> int:
        bodies.append(1)
        await connection.execute("INSERT INTO effects VALUES ('once')")
        return len(bodies)

    @app.workflow
    async def flow() -> int:
        return await put()

    Lossy.lose = ["acknowledgement"]
    asking = faulty.hold_request("recorded_step")
    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        async with asyncio.timeout(10):
            await asking.happened.wait()
        sql("UPDATE queue_entries SET worker_id = NULL")  # recovered; claimed again, by this worker
        assert await handle.result(timeout=SOON) == 1
        asking.leave.set()
    assert (effects(sql), len(bodies)) == (["once"], 1)


async def test_the_body_of_a_transactional_step_waits_for_the_barrier(
    app: App, sql: Sql, connect: Connect, schema: str, database_url: str
) -> None:
    gate = Gate()
    began: list[str] = []

    @step
    async def before() -> str:
        await gate.pass_through()
        return "before"

    @app.transaction(using=connect)
    async def put(connection: Any) -> None:
        began.append("put")
        await connection.execute("INSERT INTO effects VALUES ('once')")

    @app.workflow
    async def flow() -> None:
        await before()
        await put()

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await gate.has(1)
        locking = "SELECT FROM queue_entries WHERE workflow_id = %s FOR UPDATE"
        async with locked(database_url, schema, locking, handle.id):
            gate.open()
            await waits_for_a_lock(sql, schema)
            assert began == []
        await handle.result(timeout=SOON)
    assert effects(sql) == ["once"]


@pytest.mark.parametrize(("idle", "bodies"), [(1, 2), (99, 3)])
async def test_a_transaction_that_idles_for_longer_than_the_lease_is_ended_by_the_server(
    app: App, sql: Sql, connect: Connect, idle: int, bodies: int
) -> None:
    """A frozen owner must not hold up a take-over. The step isn't to blame, unless it does that again and again."""
    ran: list[int] = []

    @app.transaction(using=connect)
    async def put(connection: Any) -> str:
        ran.append(1)
        await connection.execute("INSERT INTO effects VALUES ('once')")
        if len(ran) <= idle:
            gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
            await until(sql, gone, connection.info.backend_pid)
        return "put"

    @app.workflow
    async def flow() -> str:
        return await put()

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        if idle < bodies:
            assert await handle.result(timeout=SOON) == "put"
        else:
            with pytest.raises(StepFailed, match="idle-in-transaction timeout"):
                await handle.result(timeout=SOON)
    assert (effects(sql), len(ran)) == (["once"] if idle < bodies else [], bodies)


async def test_outcomes_are_delivered_in_the_order_of_their_positions_while_a_commit_is_uncertain(
    app: App, sql: Sql, connect: Connect, schema: str, database_url: str, events: Any
) -> None:
    """One transaction has its turn and waits at its fence; another fails meanwhile. It must come after."""
    slow, failing = Gate(), Gate()

    @app.transaction(using=connect)
    async def commits(connection: Any) -> str:
        await slow.pass_through()
        await connection.execute("INSERT INTO effects VALUES ('once')")
        return "committed"

    @app.transaction(using=connect)
    async def fails(connection: Any) -> str:
        await failing.pass_through()
        raise ValueError("no")

    @app.workflow
    async def flow() -> list[str]:
        order: list[str] = []

        async def one() -> None:
            await commits()
            order.append("commits")

        async def other() -> None:
            try:
                await fails()
            except ValueError:
                order.append("fails")

        await asyncio.gather(one(), other())
        return order

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await slow.has(1)
        await failing.has(1)
        locking = "SELECT FROM queue_entries WHERE workflow_id = %s FOR UPDATE"
        async with locked(database_url, schema, locking, handle.id):
            slow.open()
            await waits_for_a_lock(sql, schema)  # at its fence, with its position drawn
            failing.open()
            # It has failed when its transaction is gone.
            ended = (
                "SELECT count(*) <= 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%' AND query LIKE %s"
            )
            await until(sql, ended, "%idle_in_transaction_session_timeout%")
            await until(
                sql, "SELECT count(*) = 1 FROM pg_stat_activity WHERE query LIKE '%%FOR SHARE%%' AND query LIKE %s",
                f"%{schema}%",
            )  # fmt: skip
            for _ in range(50):
                await asyncio.sleep(0)
        order = await handle.result(timeout=SOON)
    by_position = [key for (key,) in sql("SELECT key FROM workflow_steps ORDER BY position")]
    assert [key.rpartition("/")[2] for key in by_position] == order

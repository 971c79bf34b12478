"""Transactional steps: their writes and their checkpoint commit together, so they take effect exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4 as any_uuid

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from acceptance.support import SOON, Gate, hold, interrupted, only_step, replayed, served
from perdure import App, NotInWorkflow, Retry, StepFailed, current, step

Connection = psycopg.AsyncConnection[Any]


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[AsyncConnectionPool[Connection]]:
    async with AsyncConnectionPool(database_url, min_size=1, max_size=4, open=False) as pool:
        yield pool


class Ledger:
    """A table without any constraint, so that what happened twice stands there twice."""

    def __init__(self, sql: Callable[..., list[Any]]) -> None:
        self.table = f"public.ledger_{any_uuid().hex}"
        self._sql = sql
        sql(f"CREATE TABLE {self.table} (entry text)")

    async def add(self, connection: Connection, entry: str) -> None:
        await connection.execute(f"INSERT INTO {self.table} VALUES (%s)", [entry])

    @property
    def entries(self) -> list[str]:
        return [entry for (entry,) in self._sql(f"SELECT entry FROM {self.table} ORDER BY entry")]


@pytest.fixture
def ledger(sql: Callable[..., list[Any]]) -> Ledger:
    return Ledger(sql)


async def test_a_transactional_step_writes_through_its_connection(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.transaction(using=pool.connection)
    async def pay(connection: Connection, order: str, *, cents: int = 0) -> str:
        await ledger.add(connection, f"{order} {cents}")
        return order

    @app.workflow
    async def checkout(order: str) -> str:
        return await pay(order, cents=5)

    handle = await app.start(checkout("order-1"))
    assert await served(app, handle) == "order-1"
    assert ledger.entries == ["order-1 5"]
    found = await only_step(handle)
    assert (found.name, found.status, found.output, found.attempts) == ("pay", "success", "order-1", 1)


async def test_a_recorded_transactional_step_does_not_run_again(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    gate = Gate()

    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> list[str]:
        await ledger.add(connection, "paid")
        return ["paid"]

    @app.workflow
    async def checkout() -> list[str]:
        paid = await pay()
        await hold(gate)
        return paid

    assert await replayed(app, checkout(), gate) == ["paid"]
    assert ledger.entries == ["paid"]


async def test_effect_and_checkpoint_become_visible_together(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    gate = Gate()

    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> None:
        await ledger.add(connection, "paid")
        await gate.passed()

    @app.workflow
    async def checkout() -> None:
        await pay()

    async with app.worker():
        handle = await app.start(checkout())
        await gate.reached()
        assert ledger.entries == []
        assert [each.status for each in await handle.steps()] in ([], ["running"])
        gate.open()
        await handle.result(timeout=SOON)
    assert ledger.entries == ["paid"]
    assert (await only_step(handle)).status == "success"


async def test_a_transactional_step_that_is_cut_short_leaves_nothing_and_runs_again(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    gate = Gate()

    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> None:
        await ledger.add(connection, "paid")
        await gate.passed()

    @app.workflow
    async def checkout() -> None:
        await pay()

    async with interrupted(app, checkout(), gate) as handle:
        assert ledger.entries == []
    await served(app, handle)
    assert ledger.entries == ["paid"]
    assert gate.arrivals == 2


async def test_a_body_that_raises_rolls_back(app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger) -> None:
    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> None:
        await ledger.add(connection, "paid")
        raise KeyError("no")

    @app.workflow
    async def checkout() -> str:
        try:
            await pay()
        except KeyError as error:
            return repr(error)
        return ""

    handle = await app.start(checkout())
    assert await served(app, handle) == "KeyError('no')"
    assert ledger.entries == []
    assert (await only_step(handle)).status == "error"


async def test_a_failed_transactional_step_is_tried_again(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.transaction(using=pool.connection, retry=Retry(max_attempts=3, initial=timedelta(0)))
    async def pay(connection: Connection) -> int:
        await ledger.add(connection, f"attempt {current().attempt}")
        if current().attempt < 3:
            raise ConnectionError
        return current().attempt

    @app.workflow
    async def checkout() -> int:
        return await pay()

    handle = await app.start(checkout())
    assert await served(app, handle) == 3
    assert ledger.entries == ["attempt 3"]
    assert (await only_step(handle)).attempts == 3


async def test_an_error_of_the_database_is_the_steps_error(
    database_url: str, schema: str, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    async with App(errors=[psycopg.errors.DivisionByZero], database_url=database_url, schema=schema) as app:

        @app.transaction(using=pool.connection)
        async def divide(connection: Connection) -> None:
            await ledger.add(connection, "divided")
            await connection.execute("SELECT 1 / 0")

        @app.workflow
        async def flow() -> str:
            try:
                await divide()
            except psycopg.errors.DivisionByZero:
                return "caught"
            return ""

        async with app.worker():
            assert await app.run(flow()) == "caught"
    assert ledger.entries == []


async def test_an_error_of_the_database_that_nobody_named_is_a_failed_step(
    app: App, pool: AsyncConnectionPool[Connection]
) -> None:
    @app.transaction(using=pool.connection)
    async def divide(connection: Connection) -> None:
        await connection.execute("SELECT 1 / 0")

    @app.workflow
    async def flow() -> None:
        await divide()

    async with app.worker():
        with pytest.raises(StepFailed, match="DivisionByZero"):
            await app.run(flow())


async def test_what_fails_at_the_commit_leaves_neither_effect_nor_checkpoint(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger, sql: Callable[..., list[Any]]
) -> None:
    sql(f"ALTER TABLE {ledger.table} ADD CONSTRAINT once UNIQUE (entry) DEFERRABLE INITIALLY DEFERRED")

    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> str:
        await ledger.add(connection, "paid")
        return "paid"

    @app.workflow
    async def checkout() -> str:
        return await pay()

    async with app.worker():
        assert await app.run(checkout()) == "paid"
        handle = await app.start(checkout())
        with pytest.raises(StepFailed, match="UniqueViolation"):
            await handle.result(timeout=SOON)
    assert ledger.entries == ["paid"]
    assert (await only_step(handle)).status == "error"


async def test_a_result_that_cannot_be_stored_rolls_back(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> object:
        await ledger.add(connection, "paid")
        return object()

    @app.workflow
    async def checkout() -> None:
        await pay()

    async with app.worker():
        with pytest.raises(TypeError, match="'pay'"):
            await app.run(checkout())
    assert ledger.entries == []


async def test_conflicts_between_serializable_transactions_are_repeated(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    meeting = asyncio.Barrier(2)
    calls: list[str] = []

    @app.transaction(using=pool.connection, isolation="serializable")
    async def count_up(connection: Connection) -> int:
        cursor = await connection.execute(f"SELECT count(*) FROM {ledger.table}")
        row = await cursor.fetchone()
        assert row is not None
        calls.append("call")
        if len(calls) <= 2:
            await meeting.wait()
        await ledger.add(connection, str(row[0]))
        return int(row[0])

    @app.workflow
    async def flow() -> int:
        return await count_up()

    async with app.worker():
        handles = [await app.start(flow()) for _ in range(2)]
        assert sorted([await handle.result(timeout=SOON) for handle in handles]) == [0, 1]
    assert ledger.entries == ["0", "1"]
    assert len(calls) >= 3
    assert [(await only_step(handle)).attempts for handle in handles] == [1, 1], "a conflict is no failed attempt"


async def test_the_isolation_level_is_the_one_that_was_asked_for(
    app: App, pool: AsyncConnectionPool[Connection]
) -> None:
    async def level(connection: Connection) -> str:
        cursor = await connection.execute("SHOW transaction_isolation")
        row = await cursor.fetchone()
        assert row is not None
        return str(row[0])

    default = app.transaction(using=pool.connection, name="default")(level)
    repeatable = app.transaction(using=pool.connection, isolation="repeatable read", name="repeatable")(level)
    serializable = app.transaction(using=pool.connection, isolation="serializable", name="serializable")(level)

    @app.workflow
    async def flow() -> list[str]:
        return [await repeatable(), await default(), await serializable(), await default()]

    async with pool.connection() as connection:
        usual = await level(connection)
    async with app.worker():
        assert await app.run(flow()) == ["repeatable read", usual, "serializable", usual]


async def test_the_connection_comes_back_as_it_was(app: App, database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:

        @asynccontextmanager
        async def only_connection() -> AsyncIterator[Connection]:
            yield connection

        @app.transaction(using=only_connection, isolation="serializable")
        async def nothing(connection: Connection) -> None:
            await connection.execute("SELECT 1")

        @app.workflow
        async def flow() -> None:
            await nothing()

        before = await settings_of(connection)
        async with app.worker():
            await app.run(flow())
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert await settings_of(connection) == before


async def settings_of(connection: Connection) -> list[Any]:
    cursor = await connection.execute(
        "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name NOT LIKE 'transaction%' ORDER BY name"
    )
    settings = await cursor.fetchall()
    await connection.rollback()
    return [*settings, connection.autocommit, connection.isolation_level]


async def test_a_pool_of_autocommitting_connections_will_do(app: App, database_url: str, ledger: Ledger) -> None:
    async with AsyncConnectionPool(
        database_url, min_size=1, max_size=2, open=False, kwargs={"autocommit": True}
    ) as pool:

        @app.transaction(using=pool.connection)
        async def pay(connection: Connection) -> None:
            await ledger.add(connection, f"attempt {current().attempt}")
            if current().attempt == 1:
                raise ConnectionError

        @app.workflow
        async def checkout() -> None:
            await pay.with_options(retry=Retry(max_attempts=2, initial=timedelta(0)))()

        async with app.worker():
            await app.run(checkout())
    assert ledger.entries == ["attempt 2"]


async def test_another_database_is_refused_with_an_error_that_says_so(
    app: App, database_url: str, sql: Callable[..., list[Any]]
) -> None:
    name = f"other_{any_uuid().hex}"
    sql(f"CREATE DATABASE {name}")
    elsewhere = psycopg.conninfo.make_conninfo(database_url, dbname=name)

    @asynccontextmanager
    async def other_database() -> AsyncIterator[Connection]:
        async with await psycopg.AsyncConnection.connect(elsewhere) as connection:
            yield connection

    @app.transaction(using=other_database)
    async def pay(connection: Connection) -> None:
        await connection.execute("CREATE TABLE paid ()")

    @app.workflow
    async def checkout() -> None:
        await pay()

    async with app.worker():
        with pytest.raises(Exception, match=r"(?i)database"):
            await app.run(checkout())
    async with await psycopg.AsyncConnection.connect(elsewhere) as connection:
        cursor = await connection.execute("SELECT to_regclass('public.paid')")
        assert await cursor.fetchone() == (None,)


async def test_a_transactional_step_outside_a_workflow_is_a_plain_transaction(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.transaction(using=pool.connection)
    async def pay(connection: Connection, entry: str, *, fail: bool = False) -> str:
        await ledger.add(connection, entry)
        if fail:
            raise KeyError
        with pytest.raises(NotInWorkflow):
            current()
        return entry

    assert await pay("kept") == "kept"
    with pytest.raises(KeyError):
        await pay("lost", fail=True)
    assert ledger.entries == ["kept"]


async def test_a_transactional_step_in_a_step_is_a_plain_transaction(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.transaction(using=pool.connection)
    async def pay(connection: Connection) -> None:
        await ledger.add(connection, "paid")

    @step
    async def outer() -> None:
        await pay()

    @app.workflow
    async def flow() -> None:
        await outer()

    handle = await app.start(flow())
    await served(app, handle)
    assert ledger.entries == ["paid"]
    assert (await only_step(handle)).name == "outer"


async def test_transactional_and_other_steps_run_side_by_side(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    gate = Gate()

    @app.transaction(using=pool.connection)
    async def pay(connection: Connection, entry: str) -> str:
        await ledger.add(connection, entry)
        return entry

    @step
    async def plain(entry: str) -> str:
        return entry

    @app.workflow
    async def flow() -> list[str]:
        values = await asyncio.gather(*(call(f"{n}") for n in range(6) for call in (pay, plain)))
        await hold(gate)
        return list(values)

    assert await replayed(app, flow(), gate) == [str(n) for n in range(6) for _ in range(2)]
    assert ledger.entries == [str(n) for n in range(6)]


async def test_a_start_in_a_transactional_step_commits_with_it(
    app: App, pool: AsyncConnectionPool[Connection], ledger: Ledger
) -> None:
    @app.workflow
    async def other() -> str:
        return "ran"

    @app.transaction(using=pool.connection, retry=Retry(max_attempts=2, initial=timedelta(0)))
    async def pay(connection: Connection) -> str:
        await ledger.add(connection, "paid")
        handle = await app.start(other(), connection=connection)
        if current().attempt == 1:
            raise ConnectionError
        return str(handle.id)

    @app.workflow
    async def flow() -> str:
        return await pay()

    async with app.worker():
        started = await app.run(flow())
        found = [each async for each in app.workflows(name="other")]
        assert [str(each.id) for each in found] == [started]
        assert await app.handle(found[0].id).result(timeout=SOON) == "ran"
    assert ledger.entries == ["paid"]

"""PROTOCOLS §5: no effect before everything that was delivered earlier is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

import perdure
from perdure import App, Client, step, telemetry

from .support import FaultyDatabase, Gate, Sql, locked, register, waits_for_a_lock

LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)


@asynccontextmanager
async def nothing_becomes_durable(url: str, schema: str, id: UUID) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Somebody has locked the workflow's entry: whatever it records waits."""
    locking = "SELECT FROM queue_entries WHERE workflow_id = %s FOR UPDATE"
    async with locked(url, schema, locking, id) as transaction:
        yield transaction


class Bodies:
    """Steps that say when their bodies begin."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.gate = Gate()

        @step
        async def first() -> str:
            await self.gate.pass_through()
            return "first"

        @step
        async def second(after: str) -> str:
            self.began.append("second")
            return "second"

        @step(pure=True)
        async def pure(after: str) -> str:
            self.began.append("pure")
            return "pure"

        @step
        def in_a_thread(after: str) -> str:
            self.began.append("in a thread")
            return "in a thread"

        self.first, self.second, self.pure, self.in_a_thread = first, second, pure, in_a_thread


async def test_a_body_begins_only_when_earlier_outcomes_are_durable_but_a_pure_one_at_once(
    app: App, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    bodies = Bodies()

    @app.workflow
    async def flow() -> list[str]:
        one = await bodies.first()
        two = await bodies.pure(one)
        three = await bodies.second(two)
        return [one, two, three, await bodies.in_a_thread(three)]

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await bodies.gate.has(1)
        async with nothing_becomes_durable(database_url, schema, handle.id):
            bodies.gate.open()
            await events.wait_for(telemetry.StepEnded, lambda event: event.key == "pure")
            await waits_for_a_lock(sql, schema)
            assert bodies.began == ["pure"]
            assert sql("SELECT count(*) FROM workflow_steps") == [(0,)]
        assert await handle.result(timeout=SOON) == ["first", "pure", "second", "in a thread"]
    assert bodies.began == ["pure", "second", "in a thread"]


async def test_a_body_waits_for_what_was_delivered_to_another_task_of_its_run(
    app: App, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    bodies = Bodies()
    other = Gate()

    @step
    async def elsewhere() -> str:
        await other.pass_through()
        return "elsewhere"

    @app.workflow
    async def flow() -> list[str]:
        handed = asyncio.Event()

        async def left() -> str:
            value = await bodies.first()
            handed.set()
            return value

        async def right() -> str:
            await elsewhere()
            await handed.wait()
            return await bodies.second("both")

        return list(await asyncio.gather(left(), right()))

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await bodies.gate.has(1)
        await other.has(1)
        other.open()
        await events.wait_for(telemetry.FlushCommitted)  # `elsewhere` is durable
        async with nothing_becomes_durable(database_url, schema, handle.id):
            bodies.gate.open()
            await waits_for_a_lock(sql, schema)
            assert bodies.began == []
        assert await handle.result(timeout=SOON) == ["first", "second"]


async def test_values_are_recorded_without_a_round_trip_of_their_own_but_before_a_body_sees_them(
    app: App, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    bodies = Bodies()

    @app.workflow
    async def flow() -> str:
        await bodies.first()
        perdure.now()
        perdure.random()
        token = perdure.uuid4()
        return await bodies.second(str(token))

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await bodies.gate.has(1)
        async with nothing_becomes_durable(database_url, schema, handle.id):
            bodies.gate.open()
            await waits_for_a_lock(sql, schema)
            assert bodies.began == []
        await handle.result(timeout=SOON)
    flushes = [(event.checkpoints, event.ended) for event in events.of(telemetry.FlushCommitted)]
    assert flushes == [(4, 0), (1, 1)], "`first` and the values, then `second` with the result"


async def test_the_last_outcome_and_the_result_go_in_one_flush(app: App, events: Any) -> None:
    bodies = Bodies()
    bodies.gate.open()

    @app.workflow
    async def flow() -> str:
        return await bodies.first()

    async with app.worker(lease=LONG):
        await app.run(flow())
    flushes = [(event.workflows, event.checkpoints, event.ended) for event in events.of(telemetry.FlushCommitted)]
    assert flushes == [(1, 1, 1)]


async def test_a_result_is_handed_over_only_when_it_is_durable(
    app: App, sql: Sql, schema: str, database_url: str
) -> None:
    bodies = Bodies()

    @app.workflow
    async def flow() -> str:
        return await bodies.first()

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        result = asyncio.ensure_future(handle.result())
        await bodies.gate.has(1)
        async with nothing_becomes_durable(database_url, schema, handle.id):
            bodies.gate.open()
            await waits_for_a_lock(sql, schema)
            assert not result.done()
        async with asyncio.timeout(10):
            assert await result == "first"


async def test_a_waiter_whose_run_was_lost_gets_the_result_of_the_worker_that_took_over(
    app: App, sql: Sql, schema: str, database_url: str, database: FaultyDatabase
) -> None:
    bodies = Bodies()

    @app.workflow
    async def flow() -> str:
        return await bodies.first()

    heir = await register(database, lease=600)
    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        result = asyncio.ensure_future(handle.result())
        await bodies.gate.has(1)
        async with nothing_becomes_durable(database_url, schema, handle.id) as transaction:
            bodies.gate.open()
            await waits_for_a_lock(sql, schema)
            await transaction.execute("UPDATE queue_entries SET worker_id = %s, epoch = epoch + 1", [heir])
            await transaction.commit()
        sql(
            "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at, worker_id, "
            "epoch) VALUES (1, %s, '$result', 'result', 2147483647, 'success', '\"theirs\"', now(), %s, 2)",
            handle.id,
            heir,
        )
        sql("DELETE FROM queue_entries")
        async with asyncio.timeout(10):
            assert await result == "theirs"


async def test_a_hostile_checkpoint_ends_its_run_and_the_next_one_goes_on_from_it(
    app: App, sql: Sql, events: Any
) -> None:
    """The run is abandoned and replayed; that counts as a recovery without progress."""
    bodies = Bodies()

    @app.workflow
    async def flow() -> str:
        return await bodies.first()

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await bodies.gate.has(1)
        sql(
            "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
            "VALUES (1, %s, 'first', 'step', 1, 'success', '\"hostile\"', now())",
            handle.id,
        )
        bodies.gate.open()
        await events.wait_for(telemetry.RunAbandoned, lambda event: event.workflow_id == handle.id)
        assert await handle.result(timeout=SOON) == "hostile"
    assert sql("SELECT epoch, recoveries FROM workflows") == [(2, 1)]


async def test_what_a_worker_hands_over_at_its_end_is_released_behind_what_it_recorded(
    app: App, client: Client, sql: Sql, schema: str, database_url: str
) -> None:
    bodies = Bodies()

    @app.workflow
    async def flow() -> str:
        await bodies.first()
        return await bodies.second("first")

    async with app.worker(lease=LONG, grace=timedelta(0)) as worker:
        handle = await app.start(flow())
        await bodies.gate.has(1)
        async with nothing_becomes_durable(database_url, schema, handle.id):
            bodies.gate.open()
            await waits_for_a_lock(sql, schema)
            stopping = asyncio.ensure_future(worker.stop())
            await asyncio.wait({stopping}, timeout=0)
            assert sql("SELECT worker_id IS NULL FROM queue_entries") == [(False,)]
        await stopping
    assert sql("SELECT key FROM workflow_steps") == [("first",)]
    assert sql("SELECT worker_id, recoveries, stalls FROM queue_entries") == [(None, 0, 0)]
    assert bodies.began == []


@pytest.mark.parametrize("count", [1, 30])
async def test_steps_of_one_run_share_flushes(app: App, events: Any, count: int) -> None:
    @step
    async def work(number: int) -> int:
        return number

    @app.workflow
    async def flow() -> int:
        return sum(await asyncio.gather(*(work(number) for number in range(count))))

    async with app.worker(lease=LONG):
        assert await app.run(flow()) == sum(range(count))
    flushes = events.of(telemetry.FlushCommitted)
    assert sum(event.checkpoints for event in flushes) == count
    assert flushes[-1].ended == 1

"""The clock stands still, and everything that counts time obeys it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import pytest

from perdure import (
    App,
    DeadlineExceeded,
    Handle,
    Invocation,
    Retry,
    RetryAfter,
    Status,
    WorkflowNotFound,
    now,
    sleep,
    step,
    telemetry,
    timeout,
)
from perdure.model.ids import new_id
from perdure.store.statements import SHARD
from perdure.testing import Kit, TestBed

R = TypeVar("R")
Bed = Callable[..., TestBed]
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


async def test_a_day_of_sleep_is_over_when_the_clock_says_so_and_not_before(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> float:
        began = now()
        await sleep(DAY)
        return (now() - began).total_seconds()

    async with bed(app) as kit:
        began = await kit.clock.now()
        handle = await app.start(flow())
        await kit.clock.advance(DAY - timedelta(seconds=1))
        assert await handle.status() is Status.WAITING
        await kit.clock.advance(timedelta(seconds=1))
        assert await _ended(handle) == 86_400
        assert await kit.clock.now() - began == DAY


async def test_a_short_wait_in_memory_stands_still_too(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        await sleep(timedelta(seconds=0.5))
        return "awake"

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.clock.advance(timedelta(seconds=0.4))
        assert await handle.status() is Status.RUNNING
        await kit.clock.advance(timedelta(seconds=0.1))
        assert await _ended(handle) == "awake"


async def test_a_loop_of_sleeps_sees_each_hour_of_a_day(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> list[datetime]:
        seen: list[datetime] = []
        for _ in range(24):
            await sleep(HOUR)
            seen.append(now())
        return seen

    async with bed(app) as kit:
        began = await kit.clock.now()
        handle = await app.start(flow())
        await kit.clock.advance(DAY)
        hours = [(seen - began) / HOUR for seen in await _ended(handle)]
        assert hours == list(range(1, 25))


async def test_deadlines_and_limits_obey_it(bed: Bed) -> None:
    app = App("clock")

    @app.workflow(timeout=HOUR)
    async def late() -> None:
        await sleep(DAY)

    @app.workflow
    async def limited() -> str:
        try:
            async with timeout(HOUR):
                await sleep(DAY)
        except TimeoutError:
            return "limited"
        return "never"

    async with bed(app) as kit:
        handles = [await app.start(late()), await app.start(limited())]
        await kit.clock.advance(HOUR - timedelta(seconds=1))
        assert [await handle.status() for handle in handles] == [Status.WAITING] * 2
        await kit.clock.advance(timedelta(seconds=1))
        with pytest.raises(DeadlineExceeded):
            await _ended(handles[0])
        assert await _ended(handles[1]) == "limited"


async def test_pauses_between_attempts_and_polls_obey_it(bed: Bed, ran: list[str]) -> None:
    app = App("clock")

    @step(retry=Retry(max_attempts=2, initial=HOUR, maximum=HOUR, jitter=0))
    async def fails_once() -> str:
        ran.append("attempt")
        if ran.count("attempt") == 1:
            raise ValueError("not yet")
        return "done"

    @step
    async def poll() -> str:
        ran.append("poll")
        if ran.count("poll") < 3:
            raise RetryAfter(HOUR, counts=False)
        return "ready"

    @app.workflow
    async def flow() -> list[str]:
        return list(await asyncio.gather(fails_once(), poll()))

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.clock.advance(HOUR - timedelta(seconds=1))
        assert sorted(ran) == ["attempt", "poll"]
        await kit.clock.advance(timedelta(seconds=1))
        assert sorted(ran) == ["attempt", "attempt", "poll", "poll"]
        await kit.clock.advance(HOUR)
        assert await _ended(handle) == ["done", "ready"]


async def test_delayed_starts_obey_it(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        return "started"

    async with bed(app) as kit:
        handle = await app.start(flow(), delay=HOUR)
        await kit.clock.advance(HOUR - timedelta(seconds=1))
        assert await handle.status() is Status.WAITING
        await kit.clock.advance(timedelta(seconds=1))
        assert await _ended(handle) == "started"


async def test_retention_obeys_it(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> None: ...

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.clock.advance(timedelta(days=29))
        assert await handle.status() is Status.SUCCESS
        await kit.clock.advance(timedelta(days=2))
        with pytest.raises(WorkflowNotFound):
            await handle.status()


async def test_the_lease_of_another_worker_obeys_it_and_the_kits_own_goes_on(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        return "taken over"

    async with bed(app) as kit:
        handle = await _held_by_a_dead_worker(kit, flow())
        own = kit.worker.worker_id
        await kit.clock.advance(timedelta(seconds=9))
        assert await handle.status() is Status.RUNNING
        await kit.clock.advance(timedelta(seconds=1))
        assert await _ended(handle) == "taken over"
        assert kit.worker.worker_id == own


async def test_what_a_dead_worker_held_is_taken_over_on_the_way(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        await sleep(HOUR)
        return now().isoformat()

    async with bed(app) as kit:
        began = await kit.clock.now()
        handle = await _held_by_a_dead_worker(kit, flow())
        await kit.clock.advance(DAY)
        assert await _ended(handle) == (began + timedelta(seconds=10) + HOUR).isoformat()


async def test_what_a_worker_held_that_has_ended_is_taken_over_at_once(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        return "taken over"

    async with bed(app) as kit:
        dead = new_id()
        handle = await _held_by_a_dead_worker(kit, flow(), dead)
        await kit.idle()
        assert await handle.status() is Status.RUNNING
        await app.session().database.attempt("end_worker", SHARD, dead, "dead")
        await kit.idle()
        assert await handle.status() is Status.SUCCESS


async def test_a_kit_that_has_lost_its_lease_takes_up_its_work_again(bed: Bed, events: Any) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> str:
        await sleep(timedelta(seconds=0.5))
        return "done"

    async with bed(app, lease=timedelta(seconds=1)) as kit:
        handle = await app.start(flow())
        await kit.idle()
        await app.session().database.attempt("end_worker", SHARD, kit.worker.worker_id, "dead")
        await events.wait_for(telemetry.LeaseLost)
        await kit.idle()
        assert (await handle.describe()).recoveries >= 1
        await kit.clock.advance(timedelta(seconds=0.5))
        assert await _ended(handle) == "done"


async def _ended(handle: Handle[R]) -> R:
    """Its result, which must be there already."""
    assert (await handle.status()).is_final
    return await handle.result()


async def _held_by_a_dead_worker(kit: Kit, invocation: Invocation[str], dead: UUID | None = None) -> Handle[str]:
    """Started, and claimed by a worker that has just begun its lease, and won't be heard again."""
    await kit.stop_worker()
    handle = await kit.app.start(invocation)
    database, dead = kit.app.session().database, dead or new_id()
    await database.attempt("register_worker", SHARD, dead, "app", "1", "host", 1, None, '["flow"]', 1, 10.0, False)
    await _hold(database, dead)
    await kit.start_worker()
    return handle


async def _hold(database: Any, worker_id: Any) -> None:
    async with database.connection() as connection:
        text = f'UPDATE "{database.settings.schema}".queue_entries SET worker_id = $1, epoch = 1'
        await connection.execute(text, [worker_id])


async def test_it_can_be_put_forward_while_a_step_runs(bed: Bed) -> None:
    app = App("clock")
    entered, leave = asyncio.Event(), asyncio.Event()

    @step
    async def work() -> str:
        entered.set()
        await leave.wait()
        return "worked"

    @app.workflow
    async def flow() -> tuple[str, float]:
        began = now()
        done = await work()
        return done, (now() - began).total_seconds()

    async with bed(app) as kit:
        handle = await app.start(flow())
        await entered.wait()
        await kit.clock.advance(HOUR, settle=False)
        leave.set()
        assert await handle.result() == ("worked", 3600)


async def test_time_goes_on_only(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow() -> None: ...

    async with bed(app) as kit:
        with pytest.raises(ValueError, match="use a delay of 0 or more"):
            await kit.clock.advance(-HOUR)


async def test_thousands_of_sleepers_wake_together(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow(number: int) -> int:
        await sleep(DAY)
        return number

    async with bed(app) as kit:
        await app.start_many([flow(number) for number in range(2000)])
        await kit.clock.advance(DAY)
        outputs = sorted([each.output async for each in app.workflows()])
        assert outputs == list(range(2000))


async def test_each_of_many_sleepers_sees_its_own_time_never_an_earlier_one(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow(seconds: float) -> float:
        began = now()
        await sleep(timedelta(seconds=seconds))
        return (now() - began).total_seconds()

    chance = Random(1)
    delays = [round(chance.choice([0.5, 1, 90, 4000]) * chance.random(), 3) for _ in range(25)]
    async with bed(app) as kit:
        handles = await app.start_many([flow(delay) for delay in delays])
        while not all([(await handle.status()).is_final for handle in handles]):
            await kit.clock.advance(timedelta(seconds=round(1000 * chance.random() ** 6, 3)))
        assert [await _ended(handle) for handle in handles] == delays


async def test_many_small_moves_are_as_good_as_a_large_one(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow(seconds: float) -> None:
        await sleep(timedelta(seconds=seconds))

    async with bed(app) as kit:
        for first in range(1, 9):
            for second in range(1, 10 - first):  # in floats 0.2 + 0.4 isn't 0.6
                handle = await app.start(flow((first + second) / 10))
                await kit.clock.advance(timedelta(seconds=first / 10))
                await kit.clock.advance(timedelta(seconds=second / 10))
                assert await handle.status() is Status.SUCCESS, (first, second)


async def test_it_says_what_does_not_come_to_rest(bed: Bed) -> None:
    app = App("clock")

    @step
    async def hang() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def flow() -> None:
        await sleep(HOUR)
        await hang()

    async with bed(app) as kit:
        await app.start(flow())
        with pytest.raises(TimeoutError, match=r"not idle within 0.2 s: workflow 'flow' runs step 'hang'"):
            await kit.clock.advance(DAY, timeout=timedelta(seconds=0.2))


async def test_a_beat_that_is_under_way_meanwhile_does_not_end_the_lease(bed: Bed, database_url: str) -> None:
    async with (
        bed(App("clock"), lease=timedelta(seconds=2)) as kit,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as looking,
        await psycopg.AsyncConnection.connect(database_url) as locking,
    ):

        async def count(text: str) -> int:
            cursor = await looking.execute(
                f"SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE %s AND {text}",
                (f"%{kit.schema}%",),
            )
            (found,) = await cursor.fetchone() or (0,)
            return int(found)

        own = kit.worker.worker_id
        await locking.execute(f'SELECT 1 FROM "{kit.schema}".worker_rows WHERE id = %s FOR UPDATE', (own,))
        advancing = asyncio.create_task(kit.clock.advance(DAY, settle=False))
        while await count("wait_event_type = 'Lock'") < 2:  # first the clock, and behind it a beat
            await asyncio.sleep(0)
        await locking.commit()
        await advancing
        while await count("state = 'active'"):
            await asyncio.sleep(0)
        cursor = await looking.execute(
            f'SELECT status, expires_at FROM "{kit.schema}".worker_rows WHERE id = %s', (own,)
        )
        assert await cursor.fetchone() == ("live", await kit.clock.now() + timedelta(seconds=2))
        assert kit.worker.worker_id == own

"""The clock stands still, and everything that counts time obeys it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from perdure import App, DeadlineExceeded, Retry, RetryAfter, Status, WorkflowNotFound, now, sleep, step, timeout
from perdure.model.ids import new_id
from perdure.store.statements import SHARD
from perdure.testing import TestBed

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
        assert await handle.result() == 86_400
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
        assert await handle.result() == "awake"


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
        hours = [(seen - began) / HOUR for seen in await handle.result()]
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
            await handles[0].result()
        assert await handles[1].result() == "limited"


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
        assert await handle.result() == ["done", "ready"]


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
        assert await handle.result() == "started"


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
        await kit.stop_worker()
        handle = await app.start(flow())
        database, dead = app.session().database, new_id()
        await database.attempt("register_worker", SHARD, dead, "app", "1", "host", 1, None, '["flow"]', 1, 10.0, False)
        await _hold(database, dead)
        await kit.start_worker()
        own = kit.worker.worker_id
        await kit.clock.advance(timedelta(seconds=9))
        assert await handle.status() is Status.RUNNING
        await kit.clock.advance(timedelta(seconds=2))
        assert await handle.result() == "taken over"
        assert kit.worker.worker_id == own


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


async def test_many_sleepers_wake_together(bed: Bed) -> None:
    app = App("clock")

    @app.workflow
    async def flow(number: int) -> int:
        await sleep(DAY)
        return number

    async with bed(app) as kit:
        handles = await app.start_many([flow(number) for number in range(500)])
        await kit.clock.advance(DAY)
        assert [await handle.result() for handle in handles] == list(range(500))

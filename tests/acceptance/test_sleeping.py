"""Durable waits: sleep, sleep_until, timeout."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from perdure import App, now, sleep, step, telemetry, timeout

from .support import SOON


async def test_a_workflow_that_sleeps_leaves_memory_and_goes_on(app: App, events, sql) -> None:
    bodies: list[str] = []

    @step
    async def mark(what: str) -> str:
        bodies.append(what)
        return what

    @app.workflow
    async def flow() -> float:
        began = now()
        await mark("before")
        await sleep(timedelta(seconds=1.5))
        await mark("after")
        return (now() - began).total_seconds()

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        info = await handle.describe()
        assert (info.status, info.waiting_for) == ("waiting", "timer")
        assert await handle.result(timeout=SOON) >= 1.5
    assert bodies == ["before", "after"]


async def test_tasks_that_sleep_are_woken_one_after_the_other(app: App, events) -> None:
    @app.workflow
    async def flow() -> list[int]:
        order: list[int] = []

        async def nap(number: int) -> None:
            await sleep(timedelta(seconds=number * 0.1))
            order.append(number)

        await asyncio.gather(nap(3), nap(1), nap(15))
        return order

    async with app.worker():
        assert await app.run(flow()) == [1, 3, 15]


async def test_a_limit_of_time_ends_its_block(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        try:
            async with timeout(timedelta(seconds=0.1)):
                await sleep(timedelta(days=1))
        except TimeoutError:
            return "late"
        return "never"

    async with app.worker():
        assert await app.run(flow()) == "late"

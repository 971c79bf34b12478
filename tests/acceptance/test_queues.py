"""Queues: who serves them, in which order, and what becomes of what nobody knows."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance.support import SOON, served
from perdure import App, Client, Invocation, Start, Status, workflow
from perdure.telemetry import UnknownNames


async def test_workflows_run_in_the_order_in_which_they_were_started(app: App) -> None:
    ran: list[int] = []

    @app.workflow
    async def note(number: int) -> None:
        ran.append(number)

    handles = [await app.start(note(number)) for number in range(10)]
    async with app.worker(concurrency=1):
        for handle in handles:
            await handle.result(timeout=SOON)
    assert ran == list(range(10))


async def test_a_higher_priority_runs_first(app: App) -> None:
    ran: list[int] = []

    @app.workflow
    async def note(number: int) -> None:
        ran.append(number)

    handles = [await app.start(note(priority), priority=priority) for priority in (0, -5, 7, 2**31 - 1, 1, -(2**31))]
    handles += await app.start_many([Start(note(3), priority=3)])
    async with app.worker(concurrency=1):
        for handle in handles:
            await handle.result(timeout=SOON)
    assert ran == [2**31 - 1, 7, 3, 1, 0, -5, -(2**31)]


async def test_no_more_than_so_many_run_at_the_same_time(app: App) -> None:
    meeting = asyncio.Barrier(3)
    most: list[int] = []
    running: list[int] = []

    @app.workflow
    async def meet() -> None:
        running.append(1)
        most.append(len(running))
        async with asyncio.timeout(SOON.total_seconds()):
            await meeting.wait()
        running.pop()

    handles = await app.start_many(meet() for _ in range(9))
    async with app.worker(concurrency=3):
        for handle in handles:
            await handle.result(timeout=SOON)
    assert max(most) == 3


async def test_a_worker_serves_the_queues_that_it_was_given(app: App) -> None:
    @app.workflow(queue="own")
    async def name_it(name: str) -> str:
        return name

    default = await app.start(name_it("a"))
    other = await app.start(name_it("b"), queue="other")
    third = await app.start(name_it("c"), queue="third")
    async with app.worker(queues=["own", "other"]):
        assert await default.result(timeout=SOON) == "a"
        assert await other.result(timeout=SOON) == "b"
        await app.run(name_it("d"))
        assert await third.status() is Status.PENDING
    assert await served(app, third) == "c"


async def test_a_worker_without_queues_serves_all(app: App) -> None:
    @app.workflow
    async def name_it(name: str) -> str:
        return name

    async with app.worker():
        results = [await app.run(name_it(queue), queue=queue) for queue in ("a", "b", "queue with spaces", "ü")]
    assert results == ["a", "b", "queue with spaces", "ü"]


async def test_a_long_queue_does_not_starve_a_short_one(app: App) -> None:
    order: list[str] = []

    @app.job
    async def note(name: str) -> None:
        order.append(name)

    await app.start_many([note("long") for _ in range(200)], queue="a")
    short = await app.start(note("short"), queue="z")
    async with app.worker(concurrency=1):
        await short.result()
    assert order.index("short") < 20


async def test_a_queue_that_a_worker_does_not_serve_is_left_alone(app: App) -> None:
    @app.job
    async def note(name: str) -> str:
        return name

    other = await app.start(note("other"), queue="other")
    async with app.worker(queues=["mine"]):
        mine = await app.start(note("mine"), queue="mine")
        assert await mine.result() == "mine"
    assert await other.status() == "pending"


async def test_a_workflow_that_no_worker_knows_stays_pending_and_is_reported(
    app: App, database_url: str, schema: str, events: Any
) -> None:
    @app.workflow
    async def known() -> None: ...

    @workflow
    async def not_yet() -> str:
        return "at last"

    async with Client(database_url, schema=schema) as client:
        unknown = await client.start(Invocation("not_yet"))
        async with app.worker():
            event = await events.wait_for(UnknownNames)
            assert "not_yet" in event.names
            await app.run(known())
            found = await unknown.describe()
        assert (found.status, found.epoch, found.worker_id) == (Status.PENDING, 0, None)

        async with App(include=[not_yet], database_url=database_url, schema=schema) as newer, newer.worker():
            assert await unknown.result(timeout=SOON) == "at last"


async def test_what_no_worker_knows_does_not_stand_in_the_way(
    app: App, database_url: str, schema: str, events: Any
) -> None:
    @app.workflow
    async def known() -> str:
        return "done"

    ran: list[int] = []

    @workflow
    async def not_yet(number: int) -> None:
        ran.append(number)

    async with Client(database_url, schema=schema) as client:
        unknown = await client.start_many(Invocation("not_yet", number) for number in range(1200))
        behind = await client.start(Invocation("known"))
        async with app.worker(concurrency=2):
            assert await behind.result(timeout=SOON) == "done"
            await events.wait_for(UnknownNames)
        left = [await unknown[0].describe(), await unknown[-1].describe()]
        assert {each.status for each in left} <= {Status.PENDING, Status.WAITING}
        assert {each.epoch for each in left} == {0}

        async with App(include=[not_yet], database_url=database_url, schema=schema) as newer, newer.worker():
            for handle in unknown:
                await handle.result(timeout=SOON)
    assert sorted(ran) == list(range(1200))


async def test_a_worker_without_workflows_harms_nobody(app: App, database_url: str, schema: str, events: Any) -> None:
    async with App("empty", database_url=database_url, schema=schema) as empty:
        handle = await app.start(Invocation("not_yet"))
        async with empty.worker():
            await events.wait_for(UnknownNames)
        assert await handle.status() is Status.PENDING


async def test_two_workers_share_the_work_and_nothing_runs_twice(app: App, database_url: str, schema: str) -> None:
    ran: list[int] = []

    @workflow
    async def note(number: int) -> None:
        ran.append(number)

    handles = await app.start_many(Invocation("note", number) for number in range(200))
    async with (
        App("one", include=[note], database_url=database_url, schema=schema) as one,
        App("two", include=[note], database_url=database_url, schema=schema) as two,
        one.worker(concurrency=5),
        two.worker(concurrency=5),
    ):
        for handle in handles:
            await handle.result(timeout=SOON)
    assert sorted(ran) == list(range(200))
    assert len({(await handle.describe()).epoch for handle in handles}) == 1

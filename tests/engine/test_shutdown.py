"""An orderly end meets what is under way."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from perdure import App, Client, Invocation, step, telemetry

from .support import FaultyDatabase, Gate, LeaseDatabases, Sql, start_claimed_at_birth

LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)


@pytest.mark.parametrize("statement", ["claim", "start"])
async def test_what_is_claimed_while_the_worker_stops_is_pending_again_when_it_has_stopped(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql, events: Any, statement: str
) -> None:
    """The claim has taken effect, its answer is on its way."""
    bodies: list[int] = []

    @step
    async def work(number: int) -> int:
        bodies.append(number)
        return number

    @app.workflow
    async def flow(number: int) -> int:
        return await work(number)

    async with app.worker(lease=LONG) as worker:
        await app.run(flow(0))
        if statement == "start":
            number, starting, taking = await start_claimed_at_birth(app, faulty, sql, worker.worker_id)
        else:
            number, taking = 1, faulty.hold_answer("claim", with_rows=True)
            starting = asyncio.ensure_future(client.start(Invocation("flow", number)))
            async with asyncio.timeout(10):
                await taking.happened.wait()
        assert sql("SELECT worker_id = %s FROM queue_entries", worker.worker_id) == [(True,)]
        stopping = asyncio.ensure_future(worker.stop())
        for _ in range(20):
            await asyncio.sleep(0)
        taking.leave.set()
        async with asyncio.timeout(10):
            await stopping
        await starting
    assert sql("SELECT worker_id, recoveries, stalls FROM queue_entries") == [(None, 0, 0)]
    assert number not in bodies, "a step began after the worker had been asked to stop"
    assert statement == "start" or not events.of(telemetry.Reconciled), "nothing was wrong about it"


async def test_a_worker_that_stops_while_a_flush_is_under_way_waits_for_it(
    app: App, faulty: FaultyDatabase, sql: Sql
) -> None:
    @step
    async def work() -> str:
        return "done"

    @app.workflow
    async def flow() -> str:
        return await work()

    async with app.worker(lease=LONG) as worker:
        flushing = faulty.hold_request("complete")
        handle = await app.start(flow())
        async with asyncio.timeout(10):
            await flushing.happened.wait()
        stopping = asyncio.ensure_future(worker.stop())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stopping.done()
        flushing.leave.set()
        await stopping
        assert sql("SELECT status FROM workflows") == [("success",)]
        assert await handle.result(timeout=SOON) == "done"


async def test_a_worker_whose_release_got_no_answer_sends_it_again(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    async with app.worker(lease=LONG, grace=timedelta(0)):
        await app.start(flow())
        await gate.has(1)
        faulty.lose_request("release")
        faulty.lose_answer("release")
    assert sql("SELECT worker_id, recoveries, stalls FROM queue_entries") == [(None, 0, 0)]
    (stopped,) = events.of(telemetry.WorkerStopped)
    assert stopped.handed_over == 1
    assert sql("SELECT status FROM workers") == [("stopped",)]


async def test_a_worker_without_a_lease_stops_at_once(
    app: App, lease_databases: LeaseDatabases, events: Any, sql: Sql
) -> None:
    """It holds nothing that it could hand over: what it held under the old id is anybody's by now."""
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    loop = asyncio.get_running_loop()
    async with app.worker(lease=timedelta(seconds=1)):
        await app.start(flow())
        await gate.has(1)
        (database,) = lease_databases.made
        for statement in ("heartbeat", "register_worker"):
            database.lose_request(statement, times=1000)
        await events.wait_for(telemetry.RunAbandoned)
        began = loop.time()
    assert loop.time() - began < 5

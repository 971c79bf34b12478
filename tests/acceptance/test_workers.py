"""Workers: an orderly end hands work over, and nothing that was recorded is repeated."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, interrupted, served, stopping
from perdure import App, ConfigurationError, Status, step, workflow
from perdure.telemetry import StepEnded, WorkerStarted, WorkerStopped


async def test_a_worker_that_stops_lets_its_steps_end(app: App, events: Any) -> None:
    gate = Gate()
    ran: list[str] = []

    @step
    async def slow() -> str:
        await gate.passed()
        ran.append("slow")
        return "slow"

    @step
    async def after() -> str:
        ran.append("after")
        return "after"

    @app.workflow
    async def flow() -> list[str]:
        return [await slow(), await after()]

    async with app.worker(grace=SOON) as worker:
        handle = await app.start(flow())
        await gate.reached()
        stopped = await stopping(worker, handle)
        gate.open()
        await stopped
    assert ran == ["slow"]
    assert await served(app, handle) == ["slow", "after"]
    assert ran == ["slow", "after"]
    assert gate.arrivals == 1


async def test_no_other_step_begins_while_a_worker_stops(app: App) -> None:
    gate = Gate()
    ran: list[str] = []

    @step
    async def slow() -> None:
        await gate.passed()

    @step
    async def after() -> None:
        ran.append("after")

    @app.workflow
    async def flow() -> None:
        await slow()
        await after()

    async with app.worker(grace=SOON) as worker:
        handle = await app.start(flow())
        await gate.reached()
        stopped = await stopping(worker, handle)
        gate.open()
        await stopped
    assert ran == []
    assert await handle.status() is Status.PENDING
    assert [(each.key, each.status) for each in await handle.steps()] == [("slow", "success")]
    await served(app, handle)
    assert ran == ["after"]
    assert gate.arrivals == 1


async def test_a_plain_step_is_waited_for_too(app: App) -> None:
    begun, release = threading.Event(), threading.Event()
    ran: list[int] = []

    @step
    def slow() -> str:
        begun.set()
        release.wait(SOON.total_seconds())
        ran.append(1)
        return "done"

    @app.workflow
    async def flow() -> str:
        return await slow()

    async with app.worker(grace=SOON) as worker:
        handle = await app.start(flow())
        await asyncio.to_thread(begun.wait, SOON.total_seconds())
        stopped = await stopping(worker, handle)
        release.set()
        await stopped
    assert await served(app, handle) == "done"
    assert ran == [1]


async def test_what_does_not_end_within_the_grace_is_handed_over_at_once(app: App, events: Any) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> str:
        await hold(gate)
        return "done"

    async with interrupted(app, flow(), gate) as handle:
        found = await handle.describe()
        assert (found.status, found.worker_id, found.recoveries) == (Status.PENDING, None, 0)
        (stopped,) = events.of(WorkerStopped)
        assert stopped.handed_over == 1
    assert await served(app, handle) == "done"
    assert (await handle.describe()).epoch == 2


@pytest.mark.parametrize("together", [True, False], ids=["at the same time", "one after the other"])
async def test_steps_of_several_tasks_all_end_before_a_workflow_is_handed_over(
    app: App, events: Any, together: bool
) -> None:
    gates = [Gate(), Gate()]
    ran: list[int] = []

    @step
    async def slow(number: int) -> int:
        await gates[number].passed()
        ran.append(number)
        return number

    @step
    async def after(number: int) -> int:
        ran.append(10 + number)
        return number

    async def chain(number: int) -> int:
        await slow(number)
        return await after(number)

    @app.workflow
    async def flow() -> list[int]:
        return list(await asyncio.gather(chain(0), chain(1)))

    async with app.worker(grace=SOON) as worker:
        handle = await app.start(flow())
        for gate in gates:
            await gate.reached()
        stopped = await stopping(worker, handle)
        gates[0].open()
        if not together:
            await events.wait_for(StepEnded)
        gates[1].open()
        await stopped
    assert ran == [0, 1]
    assert await served(app, handle) == [0, 1]
    assert sorted(ran) == [0, 1, 10, 11], "what was recorded doesn't run again"


async def test_many_workflows_are_handed_over_and_all_end(app: App, events: Any) -> None:
    never_again: list[int] = []
    gate = Gate()

    @step
    async def first(number: int) -> int:
        never_again.append(number)
        return number

    @app.workflow
    async def flow(number: int) -> int:
        await first(number)
        await hold(gate)
        return number

    async with app.worker(grace=AT_ONCE):
        handles = await app.start_many(flow(number) for number in range(50))
        await gate.reached(times=50)
    gate.open()
    async with app.worker():
        assert [await handle.result(timeout=SOON) for handle in handles] == list(range(50))
    assert sorted(never_again) == list(range(50))


async def test_a_worker_that_is_there_already_takes_over(app: App, database_url: str, schema: str, events: Any) -> None:
    gate = Gate()

    @workflow
    async def flow() -> str:
        await hold(gate)
        return "done"

    handle = await app.start(flow())
    async with (
        App("one", include=[flow], database_url=database_url, schema=schema) as one,
        App("two", include=[flow], database_url=database_url, schema=schema) as two,
    ):
        async with one.worker(grace=AT_ONCE):
            await gate.reached()
            other = two.worker()
            await other.__aenter__()
        await gate.reached(times=2)
        gate.open()
        assert await handle.result(timeout=SOON) == "done"
        await other.__aexit__(None, None, None)
    assert (await handle.describe()).epoch == 2


async def test_a_worker_without_work_stops_at_once(app: App, events: Any) -> None:
    async with app.worker():
        pass
    (started,) = events.of(WorkerStarted)
    (stopped,) = events.of(WorkerStopped)
    assert started.worker_id == stopped.worker_id
    assert stopped.handed_over == 0


async def test_every_worker_is_a_new_one(app: App, events: Any) -> None:
    for _ in range(2):
        async with app.worker():
            pass
    first, second = events.of(WorkerStarted)
    assert first.worker_id != second.worker_id


async def test_a_workflow_that_an_exception_of_the_block_interrupts_is_handed_over(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> str:
        await hold(gate)
        return "done"

    handle = await app.start(flow())
    with pytest.raises(KeyError, match="the block"):
        async with app.worker(grace=AT_ONCE):
            await gate.reached()
            raise KeyError("the block")
    gate.open()
    assert await served(app, handle) == "done"


@pytest.mark.parametrize(
    "options", [{"lease": timedelta(milliseconds=10)}, {"concurrency": 0}, {"grace": timedelta(seconds=-1)}]
)
async def test_options_that_make_no_sense_are_refused(app: App, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        async with app.worker(**options):
            pass


async def test_the_end_of_a_step_is_told(app: App, events: Any) -> None:
    @step
    async def charge() -> None: ...

    @app.workflow
    async def checkout() -> None:
        await charge()

    async with app.worker():
        handle = await app.start(checkout())
        await handle.result()
    event = await events.wait_for(StepEnded, lambda event: event.workflow_id == handle.id)
    assert (event.workflow, event.key, event.attempt, event.status) == ("checkout", "charge", 1, "success")


async def test_two_workers_of_one_app_share_the_work(app: App) -> None:
    meeting = asyncio.Barrier(2)

    @app.workflow
    async def meet(number: int) -> int:
        async with asyncio.timeout(SOON.total_seconds()):
            await meeting.wait()
        return number

    async with app.worker(concurrency=1) as one, app.worker(concurrency=1) as other:
        assert one.worker_id != other.worker_id
        handles = [await app.start(meet(number)) for number in range(2)]
        assert [await handle.result(timeout=SOON) for handle in handles] == [0, 1]
    handle = await app.start(meet(2))
    assert await handle.status() is Status.PENDING


def test_an_app_serves_one_event_loop_after_the_other(database_url: str, schema: str) -> None:
    app = App(database_url=database_url, schema=schema)

    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    async def script(number: int) -> int:
        async with app, app.worker():
            return await app.run(double(number))

    assert [asyncio.run(script(number)) for number in range(2)] == [0, 2]


async def test_an_app_serves_several_event_loops_at_the_same_time(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    async def script(number: int) -> int:
        async with app:
            return await app.run(double(number))

    async with app.worker():
        results = await asyncio.gather(*(asyncio.to_thread(asyncio.run, script(number)) for number in range(3)))
        assert results == [0, 2, 4]
        assert await app.run(double(3)) == 6

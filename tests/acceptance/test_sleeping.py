"""Durable waits: sleep, sleep_until, timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from acceptance.support import A_WHILE, AT_ONCE, SOON, Gate, dozing, hold, served
from perdure import App, NotInWorkflow, Retry, Status, now, sleep, sleep_until, step, telemetry, timeout
from perdure.worker import WorkerOptions

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MOMENT = timedelta(milliseconds=100)
LEASE = timedelta(days=100)
Sql = Callable[..., list[Any]]


def rows_left(sql: Sql) -> tuple[list[Any], list[Any]]:
    return sql("SELECT * FROM queue_entries"), sql("SELECT * FROM waits")


def slept(sql: Sql, key: str = "sleep()") -> timedelta:
    """How long after its beginning was recorded the end of a wait was, by the database's clock."""
    ((took,),) = sql(
        "SELECT ended.created_at - begun.created_at FROM checkpoints AS begun JOIN checkpoints AS ended "
        "ON ended.workflow_id = begun.workflow_id AND ended.key = %s WHERE begun.key = %s",
        key,
        f"{key}#t",
    )
    return took


# --- in memory, and out of it --------------------------------------------------------------------------------------


async def test_a_workflow_that_sleeps_leaves_memory_and_goes_on(app: App, events: Any, sql: Sql) -> None:
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

    async with dozing(app) as worker:
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        info = await handle.describe()
        assert (info.status, info.waiting_for) == ("waiting", "timer")
        assert info.wake_at is not None
        assert handle.id not in worker._executor.runs
        assert sql("SELECT count(*) FROM queue_entries") == [(0,)]
        assert await handle.result(timeout=SOON) >= 1.5
    assert bodies == ["before", "after"]
    assert slept(sql) >= timedelta(seconds=1.5)
    assert rows_left(sql) == ([], [])


async def test_a_short_sleep_stays_in_memory(app: App, events: Any, sql: Sql) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep(timedelta(seconds=0.3))
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result(timeout=SOON) == "done"
    assert events.of(telemetry.WorkflowSuspended) == []
    assert (await handle.describe()).epoch == 1
    found = await handle.describe()
    assert found.completed_at is not None
    assert found.started_at is not None
    assert found.completed_at - found.started_at >= timedelta(seconds=0.3)


@pytest.mark.parametrize("delay", [timedelta(0), -HOUR], ids=["nothing", "the past"])
async def test_a_sleep_of_no_time_is_over_at_once_and_recorded(app: App, sql: Sql, delay: timedelta) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep(delay)
        return "done"

    async with app.worker():
        assert await app.run(flow()) == "done"
    assert sql("SELECT key FROM checkpoints WHERE kind = 'sleep'") == [("sleep()",)]


async def test_a_long_sleep_ends_when_the_database_says_so_and_not_earlier(
    app: App, clock: Any, events: Any, sql: Sql
) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep(30 * DAY)
        return "done"

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        found = await handle.describe()
        assert found.wake_at is not None
        clock.advance((found.wake_at - datetime.now(UTC)).total_seconds() - 1.5)
        assert await handle.status() is Status.WAITING
        assert await handle.result(timeout=SOON) == "done"
    assert timedelta(0) <= slept(sql) - 30 * DAY < timedelta(seconds=20)


async def test_sleep_until_an_instant(app: App, clock: Any, events: Any, sql: Sql) -> None:
    instant = datetime.now(UTC) + 3 * DAY

    @app.workflow
    async def flow() -> str:
        await sleep_until(instant)
        return "done"

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        found = await handle.describe()
        assert found.wake_at is not None
        assert timedelta(0) <= found.wake_at - instant < timedelta(seconds=1)
        clock.advance((3 * DAY).total_seconds())
        assert await handle.result(timeout=SOON) == "done"
    ((ended,),) = sql("SELECT created_at FROM checkpoints WHERE kind = 'sleep'")
    assert ended >= instant


async def test_sleep_until_an_instant_that_is_past_or_near_stays_in_memory(app: App, events: Any) -> None:
    @app.workflow
    async def flow() -> bool:
        await sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        soon = now() + timedelta(seconds=0.2)
        await sleep_until(soon)
        return now() >= soon

    async with app.worker():
        assert await app.run(flow())
    assert events.of(telemetry.WorkflowSuspended) == []


async def test_what_is_no_time_is_refused_before_anything_is_recorded(app: App, sql: Sql) -> None:
    @app.workflow
    async def seconds() -> None:
        await sleep(5)  # type: ignore[arg-type]

    @app.workflow
    async def naive() -> None:
        await sleep_until(datetime(2030, 1, 1))  # noqa: DTZ001

    async with app.worker():
        with pytest.raises(TypeError, match="timedelta"):
            await app.run(seconds())
        with pytest.raises(ValueError, match="time zone"):
            await app.run(naive())
    assert sql("SELECT count(*) FROM checkpoints WHERE kind IN ('timer', 'sleep')") == [(0,)]


async def test_outside_of_a_workflow_there_is_no_durable_sleep() -> None:
    with pytest.raises(NotInWorkflow):
        await sleep(MOMENT)


# --- crashes -------------------------------------------------------------------------------------------------------


async def test_a_crash_in_the_middle_of_a_sleep_neither_forgets_nor_restarts_it(
    app: App, clock: Any, events: Any, sql: Sql
) -> None:
    """The worker is lost while the workflow sleeps in its memory; the next one waits for what is left."""

    @app.workflow
    async def flow() -> str:
        await sleep(HOUR)
        return "done"

    staying = WorkerOptions(lease=timedelta(seconds=4), suspends_from=DAY)
    async with app._worker(staying):
        handle = await app.start(flow())
        await events.wait_for(telemetry.FlushCommitted)  # when it is due is recorded
        clock.advance(1800)
        await events.wait_for(telemetry.RunAbandoned)
        await events.wait_for(telemetry.WorkflowClaimed, lambda event: event.epoch == 2)
    async with app.worker(lease=LEASE):
        assert (await handle.describe()).started_at is not None
        clock.advance(1700)
        assert await handle.status() is not Status.SUCCESS
        clock.advance(101)
        assert await handle.result(timeout=SOON) == "done"
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'timer'") == [(1,)]
    assert timedelta(0) <= slept(sql) - HOUR < timedelta(seconds=60)


async def test_a_sleep_that_is_over_when_its_next_worker_comes_ends_at_once(
    app: App, clock: Any, events: Any, sql: Sql
) -> None:
    @app.workflow
    async def flow() -> list[str]:
        order: list[str] = []

        async def nap(name: str, delay: timedelta) -> None:
            await sleep(delay)
            order.append(name)

        await asyncio.gather(nap("long", 2 * HOUR), nap("short", HOUR))
        return order

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
    clock.advance(3 * 3600)
    assert await served(app, handle) == ["short", "long"], "in the order in which they were due"


async def test_a_sleeping_workflow_is_put_into_the_database_when_its_worker_stops(app: App, sql: Sql) -> None:
    began = asyncio.Event()

    @app.workflow
    async def flow() -> str:
        began.set()
        await sleep(timedelta(seconds=0.9))
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        await began.wait()
    assert await handle.status() in (Status.WAITING, Status.PENDING)
    assert await served(app, handle) == "done"
    assert sql("SELECT recoveries FROM workflows") == [(0,)]


# --- several tasks -------------------------------------------------------------------------------------------------


async def test_tasks_that_sleep_are_woken_one_after_the_other(app: App, events: Any) -> None:
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


async def test_a_step_that_runs_keeps_the_workflow_in_memory(app: App, events: Any, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> str:
        nap = asyncio.create_task(sleep(A_WHILE))
        await hold(gate)
        await nap
        return "done"

    @app.workflow
    async def clockwork() -> None:
        await sleep(A_WHILE)
        await sleep(timedelta(seconds=0.1))

    async with dozing(app):
        handle = await app.start(flow())
        await gate.reached()
        other = await app.start(clockwork())
        await other.result(timeout=SOON)
        assert [event.workflow_id for event in events.of(telemetry.WorkflowSuspended)] == [other.id]
        assert await handle.status() is Status.RUNNING
        gate.open()
        assert await handle.result(timeout=SOON) == "done"
    assert (await handle.describe()).epoch == 1


async def test_it_suspends_when_the_last_step_beside_a_sleep_has_ended(app: App, events: Any, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> str:
        nap = asyncio.create_task(sleep(timedelta(seconds=2)))
        await hold(gate)
        await nap
        return "done"

    async with dozing(app):
        handle = await app.start(flow())
        await gate.reached()
        assert events.of(telemetry.WorkflowSuspended) == []
        gate.open()
        await events.wait_for(telemetry.WorkflowSuspended)
        assert await handle.result(timeout=SOON) == "done"
    assert gate.arrivals == 1


async def test_what_perdure_does_not_know_keeps_the_workflow_in_memory(app: App, events: Any) -> None:
    outside = asyncio.Event()

    async def from_outside() -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        futures.append(waiter)
        outside.set()
        await waiter

    futures: list[asyncio.Future[None]] = []

    @app.workflow
    async def flow() -> str:
        await asyncio.gather(sleep(A_WHILE), from_outside())
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        await outside.wait()
        await events.wait_for(telemetry.AwaitsForeign)
        assert events.of(telemetry.WorkflowSuspended) == []
        futures[0].set_result(None)
        assert await handle.result(timeout=SOON) == "done"
    assert (await handle.describe()).epoch == 1


async def test_it_suspends_when_what_perdure_did_not_know_has_come(app: App, events: Any) -> None:
    futures: list[asyncio.Future[None]] = []
    outside = asyncio.Event()

    @app.workflow
    async def flow() -> str:
        nap = asyncio.create_task(sleep(timedelta(seconds=5)))
        if not futures:
            futures.append(asyncio.get_running_loop().create_future())
            outside.set()
        await futures[0]
        await nap
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        await outside.wait()
        await events.wait_for(telemetry.AwaitsForeign)
        futures[0].set_result(None)
        await events.wait_for(telemetry.WorkflowSuspended, timeout=2)
        assert await handle.result(timeout=SOON) == "done"


async def test_tasks_that_wait_for_each_other_do_not_keep_it_in_memory(app: App, events: Any) -> None:
    @app.workflow
    async def flow() -> str:
        event, queue, lock = asyncio.Event(), asyncio.Queue[str](), asyncio.Lock()

        async def waits_for_the_event() -> None:
            await event.wait()
            async with lock:
                await queue.put("woken")

        async def naps() -> None:
            async with lock:
                await sleep(A_WHILE)
                event.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(waits_for_the_event())
            group.create_task(naps())
            return await queue.get()

    async with dozing(app):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        assert await handle.result(timeout=SOON) == "woken"


async def test_a_pause_of_more_than_a_second_before_another_attempt_leaves_memory(
    app: App, events: Any, sql: Sql
) -> None:
    tries: list[int] = []

    @step(retry=Retry(max_attempts=3, initial=A_WHILE, jitter=0.0))
    async def work() -> int:
        tries.append(1)
        if len(tries) < 2:
            raise ValueError("not yet")
        return len(tries)

    @app.workflow
    async def flow() -> int:
        return await work()

    async with dozing(app):
        handle = await app.start(flow())
        suspended = await events.wait_for(telemetry.WorkflowSuspended)
        assert suspended.waiting_for == "retry"
        found = await handle.describe()
        assert (found.status, found.waiting_for) == (Status.WAITING, "retry")
        assert await handle.result(timeout=SOON) == 2
    assert sql("SELECT attempts FROM checkpoints WHERE key = 'work'") == [(2,)]
    ((paused,),) = sql(
        "SELECT step.started_at - attempt.created_at FROM checkpoints AS step, checkpoints AS attempt "
        "WHERE step.key = 'work' AND attempt.key = 'work#a1'"
    )
    assert paused >= A_WHILE


# --- races ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wins", ["sleep", "step"])
async def test_a_race_of_a_sleep_and_a_step_takes_the_same_branch_on_a_replay(app: App, sql: Sql, wins: str) -> None:
    racing, after = Gate(), Gate()
    branches: list[list[str]] = []

    @step
    async def work() -> str:
        await racing.passed()
        return "step"

    async def nap() -> str:
        await sleep(MOMENT if wins == "sleep" else timedelta(seconds=0.9))
        return "sleep"

    @app.workflow
    async def flow() -> list[str]:
        order: list[str] = []
        branches.append(order)
        tasks = [asyncio.create_task(nap()), asyncio.create_task(work())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        order += [task.result() for task in done]
        racing.open()
        for task in tasks:
            await task
        order += [task.result() for task in tasks]
        await hold(after)
        return order

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await racing.reached()
        if wins == "step":
            racing.open()
        await after.reached()
    after.open()
    assert await served(app, handle) == [wins, "sleep", "step"]
    assert branches == [[wins, "sleep", "step"]] * 2


async def test_many_sleeps_and_steps_are_delivered_in_one_order(app: App) -> None:
    after = Gate()
    orders: list[list[str]] = []

    @step
    async def work(number: int) -> int:
        await asyncio.sleep(0.001 * (number % 3))
        return number

    @app.workflow
    async def flow() -> list[str]:
        order: list[str] = []
        orders.append(order)

        async def one(number: int) -> None:
            for round in range(6):
                await sleep(timedelta(milliseconds=(number + round) % 3))
                order.append(f"slept {number}.{round}")
                await work(number)
                order.append(f"worked {number}.{round}")

        await asyncio.gather(*(one(number) for number in range(40)))
        await hold(after)
        return order

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await after.reached()
    after.open()
    found = await served(app, handle)
    assert orders == [found, found]
    assert len(found) == 480


# --- limits of time ------------------------------------------------------------------------------------------------


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


async def test_a_limit_of_time_cancels_a_step_and_the_replay_ends_at_the_same_point(app: App, sql: Sql) -> None:
    working, after = Gate(), Gate()
    paths: list[list[str]] = []

    @app.workflow
    async def flow() -> list[str]:
        path: list[str] = []
        paths.append(path)
        try:
            async with timeout(MOMENT) as limit:
                await hold(working)
                path.append("in time")
        except TimeoutError:
            path.append(f"late: {limit.expired}")
        await hold(after)
        return path

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await after.reached()
    after.open()
    working.open()  # a replay must not take the other branch
    assert await served(app, handle) == ["late: True"]
    assert paths == [["late: True"]] * 2
    assert working.arrivals == 1


async def test_a_long_limit_of_time_leaves_memory_and_ends_its_block(app: App, clock: Any, events: Any) -> None:
    @app.workflow
    async def flow() -> str:
        try:
            async with timeout(HOUR):
                await sleep(DAY)
        except TimeoutError:
            return "late"
        return "in time"

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        suspended = await events.wait_for(telemetry.WorkflowSuspended)
        assert suspended.seconds == pytest.approx(3600, abs=30)
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == "late"


async def test_a_block_that_ends_in_time_is_not_disturbed_by_its_limit(app: App, clock: Any, events: Any) -> None:
    @step
    async def work() -> str:
        return "fine"

    @app.workflow
    async def flow() -> list[str]:
        async with timeout(HOUR) as limit:
            found = await work()
        await sleep(DAY)
        return [found, f"{limit.expired}"]

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        suspended = await events.wait_for(telemetry.WorkflowSuspended)
        assert suspended.seconds == pytest.approx(86400, abs=30), "the limit is no more"
        clock.advance(86401)
        assert await handle.result(timeout=SOON) == ["fine", "False"]


@pytest.mark.parametrize("first", ["inner", "outer"])
async def test_of_nested_limits_the_one_that_is_over_first_ends_its_block(app: App, first: str) -> None:
    after = Gate()
    paths: list[list[str]] = []
    inner, outer = (MOMENT, HOUR) if first == "inner" else (HOUR, MOMENT)

    @app.workflow
    async def flow() -> list[str]:
        path: list[str] = []
        paths.append(path)
        try:
            async with timeout(outer):
                try:
                    async with timeout(inner):
                        await sleep(DAY)
                except TimeoutError:
                    path.append("inner")
                await sleep(timedelta(0))
                path.append("still in the outer one")
        except TimeoutError:
            path.append("outer")
        await hold(after)
        return path

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await after.reached()
    after.open()
    expected = ["inner", "still in the outer one"] if first == "inner" else ["outer"]
    assert await served(app, handle) == expected
    assert paths == [expected] * 2


async def test_both_of_two_nested_limits_may_be_over(app: App, clock: Any, events: Any) -> None:
    @app.workflow
    async def flow() -> list[str]:
        path: list[str] = []
        try:
            async with timeout(HOUR):
                try:
                    async with timeout(HOUR / 2):
                        await sleep(DAY)
                except TimeoutError:
                    path.append("inner")
                    await sleep(DAY)
        except TimeoutError:
            path.append("outer")
        return path

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        clock.advance(2 * 3600)
        assert await handle.result(timeout=SOON) == ["inner", "outer"]


async def test_no_limit_is_no_limit(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow() -> bool:
        async with timeout(None) as limit:
            await sleep(MOMENT)
        return bool(limit.expired)

    async with app.worker():
        assert await app.run(flow()) is False
    assert sql("SELECT key FROM checkpoints WHERE kind = 'timer'") == [("sleep()#t",)]


async def test_a_timeout_error_of_the_code_itself_passes_through(app: App) -> None:
    @app.workflow
    async def flow() -> bool:
        try:
            async with timeout(HOUR) as limit:
                raise TimeoutError("of its own")
        except TimeoutError as error:
            return bool(str(error) == "of its own" and not limit.expired)

    async with app.worker():
        assert await app.run(flow())

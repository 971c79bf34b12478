"""Deadlines: `timeout=` of a workflow or a start, by the database's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, interrupted, served
from perdure import App, DeadlineExceeded, Retry, Status, WorkflowCancelled, current, sleep, step, telemetry

HOUR = timedelta(hours=1)
MOMENT = timedelta(seconds=0.2)
DAYS = timedelta(days=3)
Sql = Callable[..., list[Any]]


async def exceeded(handle: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        await handle.result(timeout=SOON)
    assert await handle.status() is Status.ERROR


def rows_left(sql: Sql) -> tuple[list[Any], list[Any], list[Any]]:
    return sql("SELECT * FROM queue_entries"), sql("SELECT * FROM waits"), sql("SELECT * FROM deadlines")


async def test_a_workflow_that_has_not_ended_in_time_ends_in_error(app: App, sql: Sql) -> None:
    gate = Gate()
    seen: list[str] = []

    @app.workflow(timeout=MOMENT)
    async def flow() -> None:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with app.worker():
        handle = await app.start(flow())
        await exceeded(handle)
    found = await handle.describe()
    assert seen == ["cancelled"]
    assert found.deadline is not None
    assert found.completed_at is not None
    assert found.deadline <= found.completed_at < found.deadline + timedelta(seconds=5)
    assert found.error["type"] == "perdure.errors.DeadlineExceeded"
    assert rows_left(sql) == ([], [], [])


async def test_a_start_may_set_another_limit_than_the_workflow(app: App) -> None:
    gate = Gate()

    @app.workflow(timeout=HOUR)
    async def flow() -> str:
        await hold(gate)
        return "done"

    async with app.worker():
        short, long = await app.start(flow(), timeout=MOMENT), await app.start(flow())
        await exceeded(short)
        gate.open()
        assert await long.result(timeout=SOON) == "done"
    found = await long.describe()
    assert found.deadline is not None
    assert timedelta(0) <= found.deadline - found.created_at - HOUR < timedelta(seconds=1)


async def test_run_raises_it_to_its_caller(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> None:
        await hold(gate)

    async with app.worker():
        with pytest.raises(DeadlineExceeded):
            await app.run(flow(), timeout=MOMENT)


async def test_the_code_knows_its_deadline(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        deadline = current().deadline
        return "" if deadline is None else deadline.isoformat()

    async with app.worker():
        handle = await app.start(flow(), timeout=HOUR)
        text = await handle.result(timeout=SOON)
    assert datetime.fromisoformat(text) == (await handle.describe()).deadline
    assert datetime.fromisoformat(text) > datetime.now(UTC)


async def test_compensations_run_after_a_deadline(app: App, sql: Sql) -> None:
    gate = Gate()

    @step
    async def undo(what: str) -> str:
        return what

    @app.workflow(timeout=MOMENT)
    async def flow() -> None:
        try:
            await hold(gate)
        finally:
            await undo("a")

    async with app.worker():
        handle = await app.start(flow())
        await exceeded(handle)
    rows = sql("SELECT key FROM checkpoints WHERE kind IN ('cancel', 'step') ORDER BY position")
    assert rows == [("$cancelled",), ("undo",)]
    assert sql("SELECT payload ->> 'by' FROM checkpoints WHERE kind = 'cancel'") == [("$deadline",)]


async def test_a_worker_that_goes_in_a_compensation_leaves_the_same_end(app: App) -> None:
    working, compensating = Gate(), Gate()

    @app.workflow(timeout=MOMENT)
    async def flow() -> None:
        try:
            await hold(working)
        finally:
            await hold(compensating)

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await compensating.reached()
    compensating.open()
    async with app.worker():
        await exceeded(handle)
    assert working.arrivals == 1


async def test_a_function_that_returns_all_the_same_has_succeeded(app: App) -> None:
    gate = Gate()

    @app.workflow(timeout=MOMENT)
    async def flow() -> str:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            return "what there was"
        return "done"

    async with app.worker():
        assert await app.run(flow()) == "what there was"


async def test_a_workflow_that_sleeps_in_the_database_wakes_at_its_deadline(
    app: App, sql: Sql, clock: Any, events: Any
) -> None:
    @app.workflow(timeout=DAYS)
    async def flow() -> None:
        await sleep(10 * DAYS)

    async with app.worker(lease=30 * DAYS):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        clock.advance(DAYS.total_seconds() - 5)
        assert await handle.status() is Status.WAITING
        clock.advance(6)
        await exceeded(handle)
    assert rows_left(sql) == ([], [], [])


async def test_what_could_not_begin_in_time_never_begins(app: App, sql: Sql, clock: Any) -> None:
    ran: list[int] = []

    @app.workflow(timeout=HOUR)
    async def flow() -> None:
        ran.append(1)

    handle = await app.start(flow(), queue="nobody")
    clock.advance(3601)
    async with app.worker(queues=["somebody"]):
        await exceeded(handle)
    async with app.worker():
        pass
    assert ran == []
    assert rows_left(sql) == ([], [], [])


async def test_the_time_of_a_delayed_workflow_begins_when_it_may_start(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow(timeout=HOUR)
    async def flow() -> str:
        return "done"

    handle = await app.start(flow(), delay=DAYS)
    found = await handle.describe()
    assert found.deadline is not None
    assert found.wake_at is not None
    assert found.deadline - found.wake_at == HOUR
    clock.advance(DAYS.total_seconds() + 60)
    assert await served(app, handle) == "done"


async def test_a_deadline_that_passes_after_the_end_changes_nothing(
    app: App, sql: Sql, clock: Any, events: Any
) -> None:
    @app.workflow(timeout=HOUR)
    async def flow() -> str:
        return "done"

    async with app.worker(lease=DAYS):
        handle = await app.start(flow())
        assert await handle.result(timeout=SOON) == "done"
        assert sql("SELECT count(*) FROM deadlines") == [(1,)]
        clock.advance(3601)
        later: list[Any] = []
        for _ in range(2):  # the timers have looked once more when they wake the second
            later.append(await app.start(flow(), delay=timedelta(seconds=1)))
            await later[-1].result(timeout=SOON)
    assert sql("SELECT workflow_id FROM deadlines ORDER BY workflow_id") == [(each.id,) for each in later]
    assert await handle.status() is Status.SUCCESS
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'request'") == [(0,)]


async def test_a_deadline_that_passes_while_nobody_works_is_told_by_the_next_worker(
    app: App, sql: Sql, clock: Any
) -> None:
    gate = Gate()
    undone: list[str] = []

    @step
    async def undo() -> None:
        undone.append("undone")

    @app.workflow(timeout=HOUR)
    async def flow() -> None:
        try:
            await hold(gate)
        finally:
            await undo()

    async with interrupted(app, flow(), gate) as handle:
        clock.advance(3601)
    gate = Gate()  # closed: the interrupted one has been opened
    async with app.worker():
        await exceeded(handle)
    assert undone == ["undone"]


@pytest.mark.parametrize("first", ["cancelled", "late"])
async def test_whatever_comes_first_says_how_it_ends(app: App, sql: Sql, clock: Any, first: str) -> None:
    working, compensating = Gate(), Gate()

    @app.workflow(timeout=HOUR)
    async def flow() -> None:
        try:
            await hold(working)
        finally:
            await hold(compensating)

    async with app.worker(lease=DAYS):
        handle = await app.start(flow())
        await working.reached()
        if first == "cancelled":
            await handle.cancel(reason="first")
            await compensating.reached()
            clock.advance(3601)
        else:
            clock.advance(3601)
            await compensating.reached()
            await handle.cancel(reason="second")
        compensating.open()
        if first == "cancelled":
            with pytest.raises(WorkflowCancelled, match="first"):
                await handle.result(timeout=SOON)
        else:
            await exceeded(handle)
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'cancel'") == [(1,)]


async def test_what_was_too_late_is_not_tried_again(app: App) -> None:
    tries: list[int] = []
    gate = Gate()

    @app.workflow(timeout=MOMENT, retry=Retry(max_attempts=5, initial=timedelta(0)))
    async def flow() -> None:
        tries.append(1)
        try:
            await hold(gate)
        except asyncio.CancelledError:
            raise ValueError("on its way out") from None

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(ValueError, match="on its way out"):
            await handle.result(timeout=SOON)
    assert tries == [1]


async def test_a_pause_between_attempts_at_the_workflow_ends_with_its_deadline(
    app: App, clock: Any, events: Any
) -> None:
    tries: list[int] = []

    @app.workflow(timeout=HOUR, retry=Retry(max_attempts=5, initial=10 * HOUR, maximum=10 * HOUR))
    async def flow() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")
        await sleep(DAYS)

    async with app.worker(lease=DAYS):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        clock.advance(3601)
        await exceeded(handle)


async def test_a_resumed_workflow_has_no_deadline_any_more(app: App, sql: Sql, clock: Any) -> None:
    gate = Gate()

    @app.workflow(timeout=HOUR)
    async def flow() -> str:
        await hold(gate)
        return "done"

    async with app.worker(lease=DAYS):
        handle = await app.start(flow())
        await gate.reached()
        clock.advance(3601)
        await exceeded(handle)
        await handle.resume()
        await gate.reached(2)
        clock.advance(3601)
        gate.open()
        assert await handle.result(timeout=SOON) == "done"
    assert rows_left(sql) == ([], [], [])


@pytest.mark.parametrize("limit", [timedelta(0), -HOUR])
async def test_a_limit_that_leaves_no_time_is_refused(app: App, sql: Sql, limit: timedelta) -> None:
    @app.workflow
    async def flow() -> None: ...

    await app.start(flow())
    with pytest.raises(ValueError, match="leaves no time"):
        await app.start(flow(), timeout=limit)
    assert sql("SELECT count(*) FROM workflow_rows") == [(1,)]

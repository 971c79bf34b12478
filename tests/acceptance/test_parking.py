"""`on_exhausted="park"`: a step that has used up its attempts waits for an operator, and the code sees no error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, only_step, served
from perdure import App, DeadlineExceeded, Handle, Retry, RetryAfter, Status, WorkflowCancelled, current, sleep, step
from perdure.telemetry import StepParked, StepRetries, WorkflowClaimed, WorkflowSuspended

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]


class Printer:
    """A step that parks while there is no paper; and one that never fails."""

    def __init__(self, **retry: Any) -> None:
        self.has_paper = False
        self.attempts: list[int] = []
        self.filed: list[str] = []

        @step(name="print_label", retry=Retry(initial=timedelta(0), **retry) if retry else None, on_exhausted="park")
        async def print_label(order: str = "1") -> str:
            self.attempts.append(current().attempt)
            if not self.has_paper:
                raise ValueError(f"no paper for {order}")
            return f"label {order}"

        self.print_label = print_label

    @step
    async def file(self, what: str) -> str:
        self.filed.append(what)
        return what


async def suspensions(events: Any, handle: Handle[Any], count: int) -> Any:
    """Wait until it has left memory so many times; returns the last of these."""
    seen: list[object] = []

    def fits(event: WorkflowSuspended) -> bool:
        if event.workflow_id == handle.id and not any(event is one for one in seen):
            seen.append(event)
        return len(seen) >= count

    return await events.wait_for(WorkflowSuspended, fits)


async def test_what_parks_is_shown_with_its_last_error(app: App, events: Any, sql: Sql) -> None:
    printer = Printer(max_attempts=2)

    @app.workflow
    async def flow() -> str:
        await printer.file("before")
        return await printer.print_label()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        found = await handle.describe()
        assert (found.status, found.waiting_for, found.wake_at) == (Status.WAITING, "operator", None)
        parked = [one for one in await handle.steps() if one.status == "parked"]
        assert [(one.name, one.kind, one.attempts, one.error["message"]) for one in parked] == [
            ("print_label", "attempt", 2, "no paper for 1")
        ]
        assert sql("SELECT name FROM workflow_steps WHERE status = 'parked'") == [("print_label",)]
        (event,) = events.of(StepParked)
        assert (event.workflow_id, event.key, event.attempt) == (handle.id, "print_label", 2)
        printer.has_paper = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "label 1"
    assert [(one.name, one.status) for one in await handle.steps()] == [
        ("file", "success"),
        ("print_label", "success"),
    ]
    assert printer.filed == ["before"]


async def test_a_step_without_retry_parks_after_one_attempt_and_begins_anew(app: App, events: Any) -> None:
    printer = Printer()

    @app.workflow
    async def flow() -> str:
        return await printer.print_label()

    async with app.worker():
        handle = await app.start(flow())
        for times in (1, 2):
            await suspensions(events, handle, times)
            await handle.resume()
        await suspensions(events, handle, 3)
        printer.has_paper = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "label 1"
    assert printer.attempts == [1, 1, 1, 1]
    assert (await only_step(handle)).attempts == 1


async def test_a_parked_step_waits_over_workers_and_time(app: App, events: Any, clock: Any) -> None:
    printer = Printer(max_attempts=2)

    @app.workflow
    async def flow() -> str:
        return await printer.print_label()

    @app.workflow
    async def other() -> str:
        return await printer.file("other")

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
    clock.advance(86400 * 365)
    async with app.worker(grace=AT_ONCE):
        await app.run(other())
        assert await handle.status() is Status.WAITING
    assert printer.attempts == [1, 2]
    printer.has_paper = True
    await handle.resume()
    assert await served(app, handle) == "label 1"


async def test_other_tasks_go_on_beside_a_parked_step(app: App, events: Any, clock: Any) -> None:
    printer = Printer()

    @app.workflow
    async def flow() -> list[str]:
        async def files() -> str:
            await printer.file("first")
            await sleep(HOUR)
            return await printer.file("second")

        return list(await asyncio.gather(printer.print_label(), files()))

    async with app.worker():
        handle = await app.start(flow())
        assert (await suspensions(events, handle, 1)).waiting_for == "timer"
        clock.advance(3601)
        assert (await suspensions(events, handle, 2)).waiting_for == "operator"
        assert printer.filed == ["first", "second"]
        assert printer.attempts == [1]
        printer.has_paper = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["label 1", "second"]


async def test_a_step_that_parked_is_resumed_while_another_runs(app: App, events: Any) -> None:
    """The workflow is in memory then, and is told there."""
    printer, gate = Printer(), Gate()

    @app.workflow
    async def flow() -> str:
        label, _ = await asyncio.gather(printer.print_label(), hold(gate))
        return label

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await events.wait_for(StepParked)
        printer.has_paper = True
        await handle.resume()
        gate.open()
        assert await handle.result(timeout=SOON) == "label 1"
    assert gate.arrivals == 1
    assert printer.attempts == [1, 1]


async def test_one_resume_lets_all_parked_steps_go_on(app: App, events: Any) -> None:
    printer = Printer()

    @app.workflow
    async def flow() -> list[str]:
        return list(await asyncio.gather(*(printer.print_label(order) for order in "123")))

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        assert len(await handle.steps()) == 3
        printer.has_paper = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["label 1", "label 2", "label 3"]
    assert printer.attempts == [1] * 6


async def test_a_workflow_that_is_cancelled_while_parked_may_clean_up(app: App, events: Any) -> None:
    printer = Printer()

    @app.workflow
    async def flow() -> str:
        try:
            return await printer.print_label()
        except asyncio.CancelledError:
            await printer.file("undo")
            raise

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        await handle.cancel()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
    assert printer.filed == ["undo"]
    assert printer.attempts == [1]
    assert [one.status for one in await handle.steps() if one.status == "parked"] == []


async def test_a_deadline_ends_what_is_parked(app: App, events: Any, clock: Any) -> None:
    printer = Printer()

    @app.workflow(timeout=HOUR)
    async def flow() -> str:
        return await printer.print_label()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        clock.advance(3601)
        with pytest.raises(DeadlineExceeded):
            await handle.result(timeout=SOON)


async def test_an_error_that_is_given_up_on_parks_at_once(app: App, events: Any) -> None:
    printer = Printer(max_attempts=5, give_up_on=(ValueError,))

    @app.workflow
    async def flow() -> str:
        return await printer.print_label()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
    assert printer.attempts == [1]
    assert events.of(StepRetries) == []


async def test_a_value_that_json_cannot_carry_fails_instead_of_parking(app: App, events: Any) -> None:
    """Another try would give the same, and an operator could do nothing about it."""

    @step(on_exhausted="park")
    async def returns_a_connection() -> object:
        return object()

    @app.workflow
    async def flow() -> object:
        return await returns_a_connection()

    with pytest.raises(TypeError, match="returns_a_connection"):
        await served(app, await app.start(flow()))
    assert events.of(StepParked) == []


async def test_a_poll_that_gives_up_at_last_parks(app: App, events: Any, clock: Any, sql: Sql) -> None:
    errors: list[Exception] = [RetryAfter(HOUR, counts=False), ValueError("broken")]

    @step(on_exhausted="park")
    async def poll() -> str:
        if errors:
            raise errors.pop(0)
        return "there"

    @app.workflow
    async def flow() -> str:
        return await poll()

    async with app.worker():
        handle = await app.start(flow())
        assert (await suspensions(events, handle, 1)).waiting_for == "retry"
        clock.advance(3601)
        assert (await suspensions(events, handle, 2)).waiting_for == "operator"
        await handle.resume()
        assert await handle.result(timeout=SOON) == "there"


@pytest.mark.parametrize("kind", ["async", "def"])
async def test_a_job_parks(app: App, events: Any, kind: str) -> None:
    fails: list[int] = [1]

    async def run() -> str:
        return run_plainly()

    def run_plainly() -> str:
        if fails:
            raise ValueError("not now")
        return "done"

    job = app.job(name="job", on_exhausted="park")(run if kind == "async" else run_plainly)
    async with app.worker():
        handle = await app.start(job())
        assert (await suspensions(events, handle, 1)).waiting_for == "operator"
        fails.clear()
        await handle.resume()
        assert await handle.result(timeout=SOON) == "done"


async def test_a_transaction_that_parks_has_written_nothing(
    app: App, events: Any, database_url: str, schema: str, sql: Sql
) -> None:
    await app.session().database.fetch("clock")
    sql("CREATE TABLE effects (order_id int4)")
    fails: list[int] = [1]

    @asynccontextmanager
    async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(
            database_url, autocommit=True, options=f"-c search_path={schema}"
        ) as connection:
            yield connection

    @app.transaction(using=connect, on_exhausted="park")
    async def put(connection: psycopg.AsyncConnection[Any]) -> str:
        await connection.execute("INSERT INTO effects VALUES (1)")
        if fails:
            raise ValueError("not now")
        return "put"

    @app.workflow
    async def flow() -> str:
        return await put()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        assert sql("SELECT * FROM effects") == []
        fails.clear()
        await handle.resume()
        assert await handle.result(timeout=SOON) == "put"
    assert sql("SELECT * FROM effects") == [(1,)]


async def test_a_worker_that_takes_over_what_is_parked_beside_a_running_step_does_not_try_it(
    app: App, events: Any
) -> None:
    printer, gate = Printer(), Gate()

    @app.workflow
    async def flow() -> str:
        label, _ = await asyncio.gather(printer.print_label(), hold(gate))
        return label

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await gate.reached()
        await events.wait_for(StepParked)
    async with app.worker():
        await events.wait_for(WorkflowClaimed, lambda event: event.epoch == 2)
        await gate.reached(2)
        gate.open()
        assert (await suspensions(events, handle, 1)).waiting_for == "operator"
        assert printer.attempts == [1]
        printer.has_paper = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "label 1"

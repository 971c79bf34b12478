"""Starting later: after a delay, or at an instant; by the database's clock, and never early."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from acceptance.support import SOON, served
from perdure import App, Invocation, Start, Status

HOUR = timedelta(hours=1)


async def test_a_delayed_workflow_waits(app: App) -> None:
    @app.workflow
    async def later() -> None: ...

    @app.workflow
    async def at_once() -> None: ...

    handle = await app.start(later(), delay=HOUR)
    async with app.worker():
        for _ in range(3):
            await app.run(at_once())
        assert await handle.status() is Status.WAITING
    found = await handle.describe()
    assert found.waiting_for == "start"
    assert found.wake_at is not None
    assert timedelta(0) <= found.wake_at - found.created_at - HOUR < timedelta(seconds=1)
    assert found.started_at is None


async def test_a_delayed_workflow_runs_when_it_is_due(app: App, clock: Any) -> None:
    @app.workflow
    async def later() -> str:
        return "done"

    handle = await app.start(later(), delay=HOUR)
    due = (await handle.describe()).wake_at
    clock.advance(3601)
    assert await served(app, handle) == "done"
    found = await handle.describe()
    assert due is not None
    assert found.started_at is not None
    assert found.started_at >= due
    assert found.wake_at is None


async def test_a_workflow_starts_at_an_instant(app: App, clock: Any) -> None:
    @app.workflow
    async def later() -> str:
        return "done"

    instant = datetime.now(UTC) + timedelta(days=3)
    handle = await app.start(later(), start_at=instant)
    assert await handle.status() is Status.WAITING
    assert (await handle.describe()).wake_at == instant
    clock.advance(3 * 86400 + 1)
    assert await served(app, handle) == "done"
    found = await handle.describe()
    assert found.started_at is not None
    assert found.started_at >= instant


async def test_an_instant_that_is_past_is_now(app: App) -> None:
    @app.workflow
    async def at_once() -> str:
        return "done"

    async with app.worker():
        handles = await asyncio.gather(
            app.start(at_once(), start_at=datetime(2020, 1, 1, tzinfo=UTC)),
            app.start(at_once(), delay=timedelta(0)),
            app.start(at_once(), delay=-HOUR),
        )
        for handle in handles:
            assert await handle.result(timeout=SOON) == "done"


async def test_a_short_delay_passes_while_a_worker_runs_and_is_never_early(app: App) -> None:
    @app.workflow
    async def later() -> None: ...

    delay = timedelta(milliseconds=150)
    async with app.worker():
        handles = await app.start_many([Start(later(), delay=delay) for _ in range(20)])
        for handle in handles:
            await handle.result(timeout=SOON)
    for handle in handles:
        found = await handle.describe()
        assert found.started_at is not None
        assert found.started_at - found.created_at >= delay


async def test_delayed_workflows_come_when_they_are_due_one_after_the_other(app: App, clock: Any) -> None:
    ran: list[int] = []

    @app.workflow
    async def later(number: int) -> None:
        ran.append(number)

    handles = await app.start_many([Start(later(hours), delay=hours * HOUR) for hours in (3, 1, 2)])
    for hours, handle in ((1, handles[1]), (2, handles[2]), (3, handles[0])):
        clock.advance(3600.5)
        await served(app, handle)
        assert ran == list(range(1, hours + 1))


async def test_a_delayed_start_may_have_a_key(app: App, clock: Any) -> None:
    @app.workflow
    async def later() -> str:
        return "done"

    first = await app.start(later(), key="k", delay=HOUR)
    again = await app.start(later(), key="k")
    assert (again.id, again.started) == (first.id, False)
    assert await again.status() is Status.WAITING
    clock.advance(3601)
    assert await served(app, again) == "done"


async def test_many_that_are_due_at_once_all_run(app: App, clock: Any) -> None:
    ran: list[int] = []

    @app.workflow
    async def later(number: int) -> None:
        ran.append(number)

    handles = await app.start_many([Start(later(number), delay=HOUR) for number in range(300)])
    clock.advance(3601)
    async with app.worker():
        for handle in handles:
            await handle.result(timeout=SOON)
    assert sorted(ran) == list(range(300))


async def test_a_delayed_workflow_of_an_unknown_name_is_kept(app: App, clock: Any) -> None:
    @app.workflow
    async def known() -> None: ...

    unknown = await app.start(Invocation("not_yet"), delay=HOUR)
    clock.advance(3601)
    async with app.worker():
        await app.run(known())
    assert await unknown.status() in (Status.WAITING, Status.PENDING)

"""Events: what workflows announce, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from acceptance.support import SOON, Gate, hold, interrupted, served
from perdure import (
    App,
    NotInWorkflow,
    SerializationError,
    Status,
    WorkflowNotFound,
    WrongState,
    get_event,
    recv,
    set_event,
    step,
    telemetry,
)

Sql = Callable[..., list[Any]]
MOMENT = timedelta(milliseconds=50)


@dataclass
class Progress:
    done: int
    of: int


def declare_steps(app: App) -> Any:
    @app.workflow
    async def counts(to: int) -> None:
        for number in range(1, to + 1):
            await set_event("progress", Progress(number, to))

    return counts


async def test_callers_get_what_was_set_last_and_all_of_it_is_kept(app: App, sql: Sql) -> None:
    counts = declare_steps(app)
    async with app.worker():
        handle = await app.start(counts(3))
        await handle.result(timeout=SOON)
        assert await handle.get_event("progress", type=Progress) == Progress(3, 3)
        assert await handle.get_event("progress") == {"done": 3, "of": 3}
        assert await asyncio.to_thread(
            lambda: app.blocking.handle(handle.id).get_event("progress", type=Progress)
        ) == Progress(3, 3)
    assert sql("SELECT number, value ->> 'done' FROM events ORDER BY number") == [(1, "1"), (2, "2"), (3, "3")]
    await handle.delete()
    assert sql("SELECT count(*) FROM event_rows") == [(0,)]
    await asyncio.to_thread(app.blocking.close)


async def test_a_caller_waits_for_an_event(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        await recv("go")
        await set_event("link", None)

    async with app.worker():
        handle = await app.start(flow())
        waiting = asyncio.create_task(handle.get_event("link"))
        with pytest.raises(TimeoutError):
            await handle.get_event("link", timeout=MOMENT)
        assert not waiting.done()
        await handle.send("go", 1)
        assert await waiting is None


async def test_a_timeout_of_nothing_asks_whether_it_is_there(app: App) -> None:
    counts = declare_steps(app)

    @app.workflow
    async def silent() -> None:
        await recv("end")

    async with app.worker():
        handle = await app.start(counts(3))
        await handle.result(timeout=SOON)
        assert await handle.get_event("progress", type=Progress, timeout=timedelta(0)) == Progress(3, 3)
        with pytest.raises(TimeoutError):
            await (await app.start(silent())).get_event("progress", timeout=timedelta(0))


async def test_a_workflow_waits_for_an_event_of_another_one_out_of_memory(app: App, events: Any, sql: Sql) -> None:
    @app.workflow
    async def leader() -> None:
        await recv("go")
        await set_event("ready", [1])

    @app.workflow
    async def follower(of: str) -> object:
        return await get_event(UUID(of), "ready")

    async with app.worker():
        first = await app.start(leader())
        followers = [await app.start(follower(str(first.id))) for _ in range(3)]
        for each in followers:
            await events.wait_for(telemetry.WorkflowSuspended, lambda event, id=each.id: event.workflow_id == id)
        assert (await followers[0].describe()).status is Status.WAITING
        await first.send("go", 1)
        assert [await each.result(timeout=SOON) for each in followers] == [[1]] * 3
        late = await app.start(follower(str(first.id)))
        assert await late.result(timeout=SOON) == [1]
    assert sql("SELECT count(*) FROM event_waits") == [(0,)]


async def test_what_a_workflow_got_is_what_it_gets_on_replay(app: App) -> None:
    gate = Gate()
    seen: list[object] = []
    number = 1

    @app.workflow
    async def leader() -> None:
        for _ in range(2):
            await set_event("number", await recv("numbers"))

    @app.workflow
    async def follower(of: str) -> None:
        seen.append(await get_event(UUID(of), "number"))
        await hold(gate)

    async with app.worker():
        first = await app.start(leader())
        await first.send("numbers", number)
        assert await first.get_event("number") == 1
    async with interrupted(app, follower(str(first.id)), gate) as handle:
        await first.send("numbers", 2)
    await served(app, handle)
    assert await first.get_event("number") == 2
    assert seen == [1, 1]


async def test_an_event_that_does_not_come_in_time_is_a_timeout(app: App) -> None:
    @app.workflow
    async def leader() -> None:
        await recv("go")

    @app.workflow
    async def follower(of: str) -> str:
        try:
            await get_event(UUID(of), "ready", timeout=MOMENT)
        except TimeoutError:
            return "too late"
        return "in time"

    async with app.worker():
        first = await app.start(leader())
        assert await app.run(follower(str(first.id))) == "too late"


async def test_what_will_never_come_is_an_error(app: App) -> None:
    counts = declare_steps(app)

    @app.workflow
    async def follower(of: str) -> None:
        await get_event(UUID(of), "link")

    async with app.worker():
        handle = await app.start(counts(1))
        await handle.result(timeout=SOON)
        with pytest.raises(WrongState, match="it has ended without setting event 'link'"):
            await handle.get_event("link")
        with pytest.raises(WrongState, match="'link'"):
            await app.run(follower(str(handle.id)))
        with pytest.raises(WorkflowNotFound):
            await app.run(follower(str(uuid4())))
        with pytest.raises(WorkflowNotFound):
            await app.handle(uuid4()).get_event("link")
        with pytest.raises(SerializationError, match="progress"):
            await handle.get_event("progress", type=int)


async def test_steps_set_events_once_however_often_they_run(app: App, sql: Sql) -> None:
    gate = Gate()

    @step
    async def works() -> None:
        await set_event("stage", "begun")
        await set_event("stage", "going on")
        await gate.passed()

    @app.workflow
    async def flow() -> None:
        await works()

    async with interrupted(app, flow(), gate) as handle:
        assert await handle.get_event("stage") == "going on"
    await served(app, handle)
    assert sql("SELECT number, value FROM events ORDER BY number") == [(1, "begun"), (2, "going on")]


async def test_two_tasks_that_set_one_event_both_do(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow() -> None:
        await asyncio.gather(*(set_event("stage", number) for number in range(20)))

    async with app.worker():
        await app.run(flow())
    assert sql("SELECT number FROM events ORDER BY number") == [(number,) for number in range(1, 21)]
    assert sorted(sql("SELECT value FROM events")) == [(number,) for number in range(20)]


async def test_many_that_wait_and_many_that_set_meet(app: App) -> None:
    """Whichever comes first, nobody waits in vain."""

    @app.workflow
    async def leader() -> None:
        await set_event("ready", True)
        await recv("end")

    @app.workflow
    async def follower(of: str) -> object:
        return await get_event(UUID(of), "ready")

    async with app.worker():
        pairs: list[tuple[Any, Any]] = []
        for _ in range(40):
            first = await app.start(leader())
            pairs.append((first, await app.start(follower(str(first.id)))))
        for first, second in pairs:
            assert await second.result(timeout=SOON) is True
            await first.send("end", None)
            await first.result(timeout=SOON)


async def test_outside_it_says_where_to_go() -> None:
    with pytest.raises(NotInWorkflow, match="inside a workflow or a step"):
        await set_event("progress", 1)
    with pytest.raises(NotInWorkflow, match=r"handle\.get_event"):
        await get_event(UUID(int=0), "progress")

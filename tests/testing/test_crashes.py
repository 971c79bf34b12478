"""The crash explorer: each durable boundary, in the process and with SIGKILL."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any
from uuid import UUID

import psycopg
import pytest

from perdure import (
    App,
    Handle,
    Rerun,
    Retry,
    RetryAfter,
    current,
    now,
    random,
    recv,
    saga,
    send,
    sleep,
    step,
    timeout,
    uuid4,
)
from perdure.testing import CrashFailure, TestBed
from perdure.testing.crashes import Boundaries, importable

from . import flows

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)


async def test_every_boundary_is_tried_and_what_ran_twice_is_named(bed: Bed) -> None:
    async with bed(flows.app) as kit:
        report = await kit.crash_everywhere(flows.checkout(1))
    assert report.boundaries[:4] == (
        "before step 'charge' (attempt 1)",
        "after step 'charge' (attempt 1)",
        "before commit 1",
        "after commit 1",
    )
    assert {"before step 'send_receipt' (attempt 1)", "after step 'send_receipt' (attempt 1)"} <= set(report.boundaries)
    assert report.reran == ("charge",)
    assert str(report).endswith("bodies that ran twice, and aren't declared idempotent: charge")


async def test_sigkill_shows_the_same_whatever_the_code_prints(bed: Bed) -> None:
    async with bed(flows.app) as kit:
        report = await kit.crash_everywhere(flows.announced(), kill=True)
        assert await kit.run(flows.announced()) == "done", "the kit has its worker again"
    assert report.reran == ("announce",)
    assert report.boundaries == (
        "before step 'announce' (attempt 1)",
        "after step 'announce' (attempt 1)",
        "before commit 1",
        "after commit 1",
    )


@pytest.mark.full
async def test_children_messages_and_streams_survive_sigkill(bed: Bed, database_url: str) -> None:
    async with bed(flows.app) as kit:
        report = await kit.crash_everywhere(flows.family(), kill=True)
        assert len(report.boundaries) > 10
        with psycopg.connect(database_url, options=f"-c search_path={kit.schema}") as connection:
            of_each = "IN (SELECT id FROM workflows WHERE name = 'family') GROUP BY"
            counts = [
                connection.execute(statement.encode()).fetchall()
                for statement in (
                    "SELECT count(*) FROM workflows WHERE name = 'family' GROUP BY id",
                    f"SELECT count(*) / 2 FROM workflows WHERE parent_id {of_each} parent_id",
                    f"SELECT count(*) FROM messages WHERE workflow_id {of_each} workflow_id",
                    f"SELECT count(*) FROM stream_entries WHERE NOT is_void AND workflow_id {of_each} workflow_id",
                )
            ]
    assert all(each == counts[0] for each in counts), counts


async def test_a_workflow_with_all_that_there_is_comes_to_the_same_end(bed: Bed, database_url: str) -> None:
    app = App("everything")

    @asynccontextmanager
    async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(database_url) as opened:
            yield opened

    @step
    async def echo(name: str) -> str:
        return name

    @step(retry=Retry(max_attempts=2, initial=timedelta(hours=1)))
    async def flaky(name: str) -> str:
        if current().attempt < 2:
            raise ValueError("not yet")
        return name

    @app.transaction(using=connection)
    async def count(opened: psycopg.AsyncConnection[Any]) -> int:
        cursor = await opened.execute("SELECT 41 + 1")
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    @step(pure=True)
    def double(number: int) -> int:
        return number * 2

    @app.workflow
    async def flow() -> list[Any]:
        uuid4(), random().random(), now()
        first = await asyncio.gather(echo("a"), flaky("b"), count(), double(4))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(echo("c"))
        try:
            async with timeout(DAY):
                await sleep(2 * DAY)
        except TimeoutError:
            first.append("late")
        return [*first, task.result()]

    async with bed(app) as kit:
        assert await kit.run(flow()) == ["a", "b", 42, 8, "late", "c"]
        report = await kit.crash_everywhere(flow())
    assert set(report.reran) == {"echo", "flaky"}, "pure and transactional steps may run again"
    assert len(report.boundaries) > 20


async def test_a_failure_and_a_workflow_that_is_tried_again_come_to_the_same_end(bed: Bed) -> None:
    app = App("failing")

    @step(idempotent=True)
    async def fail() -> None:
        raise ValueError("always")

    @app.workflow(retry=Retry(max_attempts=2, initial=DAY))
    async def flow() -> None:
        await fail()

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow())
    assert report.reran == ()
    assert report.boundaries.count("before step 'fail' (attempt 1)") == 2


async def test_a_cancellation_with_its_clean_up_comes_to_the_same_end(bed: Bed) -> None:
    app = App("cancelled")

    @step(idempotent=True)
    async def reserve() -> str:
        return "12A"

    @step(idempotent=True)
    async def release(seat: str) -> None: ...

    @app.workflow
    async def book() -> None:
        seat = await reserve()
        try:
            await sleep(DAY)
        except asyncio.CancelledError:
            await release(seat)
            await release(seat)
            raise

    async with bed(app) as kit:

        async def cancel(handle: Handle[Any]) -> None:
            await kit.idle()
            await handle.cancel(reason="changed my mind")

        report = await kit.crash_everywhere(book(), drive=cancel)
    assert "before step 'release#2' (attempt 1)" in report.boundaries


async def test_messages_are_sent_and_received_once_wherever_it_crashes(bed: Bed) -> None:
    app = App("talks")
    collectors: list[Handle[list[int]]] = []

    @app.workflow
    async def collect() -> list[int]:
        return [await recv("numbers", type=int) for _ in range(3)]

    @step
    async def report(to: UUID, number: int) -> None:
        await send(to, "numbers", number)

    @app.workflow
    async def flow() -> str:
        collector = await recv("collector", type=UUID)
        await send(collector, "numbers", 1)
        await report(collector, 2)
        try:
            await recv("collector", timeout=timedelta(minutes=1))
        except TimeoutError:
            await send(collector, "numbers", 3)
        return "sent"

    async def tell(handle: Handle[str]) -> None:
        collectors.append(await app.start(collect()))
        await handle.send("collector", collectors[-1].id)

    async with bed(app) as kit:
        tried = await kit.crash_everywhere(flow(), drive=tell)
        assert [await kit.finish(collector) for collector in collectors] == [[1, 2, 3]] * len(collectors)
    assert {"before step 'send()' (attempt 1)", "after step 'send()#2' (attempt 1)"} <= set(tried.boundaries)
    assert tried.reran == ("report",)


async def test_a_saga_undoes_the_same_wherever_it_crashes(bed: Bed) -> None:
    app, booked = App("trips"), set[str]()

    @step(idempotent=True)
    async def book(what: str) -> str:
        if what == "car":
            raise ValueError("no car left")
        booked.add(what)
        return what

    @step(idempotent=True)
    async def undo(what: str) -> None:
        booked.discard(what)

    @app.workflow
    async def trip() -> None:
        async with saga() as s:
            for what in ("flight", "hotel", "car"):
                s.compensate(undo, await book(what))

    async with bed(app) as kit:
        report = await kit.crash_everywhere(trip(), same=lambda one, other: one.error == other.error and not booked)
    assert {"before step 'undo#2' (attempt 1)", "after step 'undo' (attempt 1)"} <= set(report.boundaries)


async def test_a_step_that_finds_out_what_became_of_it_runs_once_wherever_it_crashes(bed: Bed) -> None:
    app, paid = App("careful"), dict[str, str]()

    async def ask() -> str:
        if current().idempotency_key not in paid:
            raise Rerun
        return paid[current().idempotency_key]

    @step(in_doubt=ask)
    async def pay() -> str:
        assert current().idempotency_key not in paid, "it pays twice"
        paid[current().idempotency_key] = "paid"
        return "paid"

    @app.workflow
    async def flow() -> str:
        return await pay()

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow())
    assert {"before step 'pay' (attempt 1)", "after step 'pay' (attempt 1)"} <= set(report.boundaries)
    assert len(set(paid)) == len(report.boundaries) + 1


async def test_a_workflow_that_a_crash_changes_is_found(bed: Bed) -> None:
    app, began = App("unsafe"), 0

    @step
    async def echo(number: int) -> int:
        return number

    @app.workflow
    async def flow() -> int:
        nonlocal began
        began += 1  # plain code runs once for each run: this counts crashes
        await echo(1)
        return began % 2

    async with bed(app) as kit:
        with pytest.raises(CrashFailure, match=r"crashed .*: it ended with [01]; without a crash with [01]"):
            await kit.crash_everywhere(flow())


async def test_what_differs_each_time_can_be_compared_otherwise(bed: Bed) -> None:
    app = App("ids")

    @app.workflow
    async def flow() -> str:
        return str(uuid4())

    async with bed(app) as kit:
        with pytest.raises(CrashFailure):
            await kit.crash_everywhere(flow())
        report = await kit.crash_everywhere(flow(), same=lambda one, other: len(one) == len(other))
    assert report.boundaries == ("before commit 1", "after commit 1")


async def test_what_runs_again_without_a_crash_is_not_named(bed: Bed) -> None:
    app = App("again")

    @step
    async def fail() -> None:
        raise ValueError("always")

    @app.workflow(retry=Retry(max_attempts=2, initial=DAY))
    async def tried_again() -> None:
        await fail()

    async with bed(app) as kit:
        boundaries = len((await kit.crash_everywhere(tried_again())).boundaries)
        polls = 0

        @step
        async def poll() -> None:
            nonlocal polls
            polls += 1
            if polls % 3:
                raise RetryAfter(DAY, counts=False)

        @app.workflow
        async def waits() -> None:
            await poll()

        await kit.stop_worker()
        await kit.start_worker()  # one that knows both
        with Boundaries(None, lambda _: None) as calm:
            await kit.run(waits())
    assert boundaries > 4
    assert calm.bodies == {("poll", 1): 3}
    assert calm.reran(calm.bodies) == set()


async def test_no_boundary_of_tasks_that_race_is_left_out(bed: Bed) -> None:
    app = App("tasks")

    @step(idempotent=True)
    async def echo(text: str) -> str:
        return text

    @app.workflow
    async def flow() -> list[str]:
        async def branch(name: str) -> str:
            for seconds in (0.2, 600):
                await sleep(timedelta(seconds=seconds))
                await echo(name)
            return name

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(name), name=name) for name in "ab"]
        return [task.result() for task in tasks]

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow())
    steps = [where for where in report.boundaries if "step" in where]
    keys = ("a/echo", "a/echo#2", "b/echo", "b/echo#2")
    assert sorted(steps) == sorted(f"{side} step '{key}' (attempt 1)" for side in ("after", "before") for key in keys)


async def test_a_body_before_which_it_was_crashed_has_not_run(bed: Bed, ran: list[str]) -> None:
    app = App("counted")

    @step
    async def effect() -> None:
        ran.append("effect")

    @app.workflow
    async def flow() -> None:
        await effect()

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow())
    assert len(report.boundaries) == 4
    assert len(ran) == 7, "without a crash 1, before the body 1, behind it 2, before the commit 2, behind it 1"


async def test_a_boundary_that_only_a_later_run_passes_is_tried_too(bed: Bed) -> None:
    app, first = App("later"), True

    @step(idempotent=True)
    async def plain() -> None: ...

    @step(idempotent=True)
    async def cautious() -> None: ...

    @app.workflow
    async def flow() -> str:
        await (plain() if first else cautious())
        return "done"

    async def drive(handle: Handle[Any]) -> None:
        nonlocal first
        await kit.finish(handle)
        first = False

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow(), drive=drive)
    assert [where for where in report.boundaries if "step" in where] == [
        "before step 'cautious' (attempt 1)",
        "after step 'cautious' (attempt 1)",
    ]


async def test_a_deadline_is_the_same_end_at_another_time(bed: Bed) -> None:
    app = App("late")

    @app.workflow(timeout=DAY)
    async def flow() -> None:
        await sleep(2 * DAY)

    async with bed(app) as kit:
        report = await kit.crash_everywhere(flow())
    assert len(report.boundaries) >= 4


async def test_what_parks_needs_an_operator(bed: Bed) -> None:
    app, mended = App("parks"), False

    @step(idempotent=True, on_exhausted="park")
    async def stuck() -> None:
        if not mended:
            raise ValueError("mend it")

    @app.workflow
    async def flow() -> str:
        await stuck()
        return "done"

    async def operate(handle: Handle[Any]) -> None:
        nonlocal mended
        await kit.idle()
        mended = True
        await handle.resume()
        await kit.idle()
        mended = False

    async with bed(app) as kit:
        with pytest.raises(TimeoutError, match="'flow' is waiting, for operator, and nothing is due"):
            await kit.crash_everywhere(flow())
        report = await kit.crash_everywhere(flow(), drive=operate)
    assert report.boundaries.count("before step 'stuck' (attempt 1)") == 2


async def test_as_many_boundaries_as_are_allowed_are_not_too_many(bed: Bed) -> None:
    app = App("few")

    @app.workflow
    async def flow() -> None: ...

    async with bed(app) as kit:
        assert len((await kit.crash_everywhere(flow(), most=2)).boundaries) == 2


async def test_too_many_boundaries_are_said(bed: Bed) -> None:
    async with bed(flows.app) as kit:
        with pytest.raises(CrashFailure, match="more than 3 boundaries; try a smaller case, or set most="):
            await kit.crash_everywhere(flows.checkout(1), most=3)


async def test_what_another_process_cannot_do_is_refused(bed: Bed) -> None:
    app = App("local")

    @app.workflow
    async def flow() -> None: ...

    async def drive(handle: Handle[Any]) -> None: ...

    async with bed(app) as kit:
        with pytest.raises(ValueError, match="make the app the global of a module that can be imported"):
            await kit.crash_everywhere(flow(), kill=True)
    async with bed(flows.app) as kit:
        with pytest.raises(ValueError, match=r"takes no drive="):
            await kit.crash_everywhere(flows.checkout(1), kill=True, drive=drive)


def test_another_process_imports_the_module_of_the_workflows_rather_than_one_that_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = ModuleType("uses_flows")
    user.app = flows.app  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "modules", {"uses_flows": user, **sys.modules})
    assert importable(flows.app) == (flows.__name__, "app")

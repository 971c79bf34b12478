"""The kit: its worker, its rest, its stand-ins, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from random import Random
from typing import Any

import psycopg
import pytest

from perdure import (
    App,
    ForeignAwait,
    Status,
    WorkflowCancelled,
    failures,
    now,
    sleep,
    step,
    telemetry,
    timeout,
    uuid4,
)
from perdure.model.keys import CANCEL
from perdure.store.arrays import Uuids
from perdure.store.statements import SHARD
from perdure.testing import TestBed, place

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)
SHORT = timedelta(seconds=0.3)


async def test_idle_waits_for_steps_of_all_kinds(bed: Bed, ran: list[str], database_url: str) -> None:
    app = App("kit")

    @asynccontextmanager
    async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(database_url) as opened:
            yield opened

    @app.transaction(using=connection)
    async def book(opened: psycopg.AsyncConnection[Any], name: str) -> None:
        await opened.execute("SELECT pg_sleep(0.01)")
        ran.append(name)

    @step
    async def slow(name: str) -> str:
        for _ in range(50):
            await asyncio.sleep(0)
        ran.append(name)
        return name

    @step
    def in_thread(name: str) -> str:
        ran.append(name)
        return name

    @step(pure=True)
    async def pure(name: str) -> str:
        ran.append(name)
        return name

    @app.workflow
    async def flow() -> None:
        await asyncio.gather(slow("a"), in_thread("b"), pure("c"), book("d"), sleep(DAY))

    async with bed(app) as kit:
        handles = [await app.start(flow()) for _ in range(10)]
        await kit.idle()
        assert sorted(ran) == sorted(["a", "b", "c", "d"] * 10)
        assert {await handle.status() for handle in handles} == {Status.WAITING}


async def test_idle_waits_for_the_connection_of_a_step_while_another_task_sleeps(bed: Bed, database_url: str) -> None:
    app = App("kit")
    asked, given = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        asked.set()
        await given.wait()
        async with await psycopg.AsyncConnection.connect(database_url) as opened:
            yield opened

    @app.transaction(using=connection)
    async def book(opened: psycopg.AsyncConnection[Any]) -> str:
        return "booked"

    @app.workflow
    async def flow() -> str:
        return (await asyncio.gather(book(), sleep(DAY)))[0]

    async with bed(app) as kit:
        handle = await app.start(flow())
        await asked.wait()
        with pytest.raises(TimeoutError, match=r"not idle within 0.3 s: workflow 'flow' runs, or waits for"):
            await kit.idle(timeout=SHORT)
        given.set()
        assert await kit.finish(handle) == "booked"


async def test_nothing_moves_after_idle_until_the_clock_does(bed: Bed) -> None:
    app = App("kit")

    @step
    async def effect() -> None:
        await asyncio.sleep(0)

    @step
    def in_thread() -> None: ...

    @step(pure=True)
    async def pure() -> None: ...

    async def late() -> None:
        try:
            async with timeout(timedelta(seconds=0.3)):
                await sleep(timedelta(seconds=1))
        except TimeoutError:
            await pure()

    @app.workflow
    async def flow(seed: int) -> None:
        chance = Random(seed)

        async def branch() -> None:
            for _ in range(chance.randrange(2, 6)):
                match chance.randrange(6):
                    case 0:
                        await effect()
                    case 1:
                        await in_thread()
                    case 2:
                        await sleep(timedelta(seconds=chance.choice([0, 0.001, 0.2, 0.9, 1.5, 60])))
                    case 3:
                        await asyncio.gather(effect(), pure(), effect())
                    case 4:
                        await late()
                    case _:
                        await asyncio.create_task(pure())
                        uuid4(), now()

        await asyncio.gather(branch(), branch(), branch())

    async with bed(app) as kit:
        handles = await app.start_many([flow(seed) for seed in range(30)])
        for _ in range(100):
            await kit.idle()
            moved: list[telemetry.Event] = []
            unsubscribe = telemetry.subscribe(moved.append)
            async with app.session().database.connection() as connection:
                await connection.execute("SELECT pg_sleep(0.01)")  # real time passes
            unsubscribe()
            assert moved == []
            due = await kit.clock.next_due()
            if due is None:
                break
            await kit.clock.advance(due - await kit.clock.now(), settle=False)
        assert {await handle.status() for handle in handles} == {Status.SUCCESS}


async def test_it_is_idle_while_short_waits_have_all_slots(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> None:
        await sleep(timedelta(seconds=0.5))

    async with bed(app, concurrency=1) as kit:
        handles = [await app.start(flow()) for _ in range(3)]
        await kit.idle()
        assert sorted([await handle.status() for handle in handles]) == [Status.PENDING] * 2 + [Status.RUNNING]
        await kit.clock.advance(timedelta(seconds=1.5))
        assert {await handle.status() for handle in handles} == {Status.SUCCESS}


async def test_a_queue_that_is_paused_is_at_rest(bed: Bed) -> None:
    app = App("kit")

    @app.workflow(queue="paused")
    async def flow() -> None: ...

    async with bed(app) as kit:
        async with app.session().database.connection() as connection:
            await connection.execute(f"INSERT INTO \"{kit.schema}\".queue_rows VALUES (1, 'paused', true, now())")
        handle = await app.start(flow())
        await kit.idle()
        assert await handle.status() is Status.PENDING


async def test_idle_finds_what_became_claimable_without_being_told(bed: Bed) -> None:
    app = App("kit")

    @app.workflow(queue="paused")
    async def flow() -> None: ...

    async with bed(app) as kit:
        handles: list[Any] = []
        for _ in range(10):
            async with app.session().database.connection() as connection:
                await connection.execute(f"INSERT INTO \"{kit.schema}\".queue_rows VALUES (1, 'paused', true, now())")
                handles.append(await app.start(flow()))
                await kit.idle()
                await connection.execute(f'DELETE FROM "{kit.schema}".queue_rows')
            await kit.idle()
        assert {await handle.status() for handle in handles} == {Status.SUCCESS}


async def test_idle_says_what_goes_on(bed: Bed) -> None:
    app = App("kit")

    @step
    async def hang() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def flow() -> None:
        await hang()

    async with bed(app) as kit:
        await app.start(flow())
        with pytest.raises(TimeoutError, match=r"not idle within 0.3 s: workflow 'flow' runs step 'hang'"):
            await kit.idle(timeout=SHORT)


async def test_idle_waits_for_what_a_cancellation_sets_going(bed: Bed, ran: list[str]) -> None:
    app = App("kit")

    @step
    async def clean_up() -> None:
        ran.append("cleaned")

    @app.workflow
    async def flow() -> None:
        try:
            await sleep(DAY)
        finally:
            await clean_up()

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.idle()
        await handle.cancel(reason="enough")
        await kit.idle()
        assert (ran, await handle.status()) == (["cleaned"], Status.CANCELLED)
        with pytest.raises(WorkflowCancelled, match="enough"):
            await kit.finish(handle)


async def test_idle_finds_what_a_workflow_was_woken_for_without_being_told(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> None:
        await sleep(timedelta(seconds=0.5))

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.idle()
        said, result = json.dumps({"reason": "elsewhere"}), failures.record(WorkflowCancelled("elsewhere"))
        await app.session().database.attempt(
            "cancel", SHARD, Uuids([handle.id]), CANCEL, said, None, "cancelled", result
        )
        await kit.idle()
        assert await handle.status() is Status.CANCELLED


async def test_finish_says_what_no_clock_brings(bed: Bed) -> None:
    app = App("kit")

    @step(on_exhausted="park")
    async def stuck() -> None:
        raise ValueError("an operator must see to it")

    @app.workflow
    async def flow() -> None:
        await stuck()

    async with bed(app) as kit:
        with pytest.raises(TimeoutError, match="'flow' is waiting, for operator, and nothing is due"):
            await kit.run(flow())


async def test_finish_gives_up_on_what_does_not_come_to_rest(bed: Bed) -> None:
    app = App("kit")

    @step
    async def hang() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def flow() -> None:
        await sleep(DAY)
        await hang()

    async with bed(app) as kit:
        handle = await app.start(flow())
        with pytest.raises(TimeoutError, match=r"not idle within 0.3 s: workflow 'flow' runs step 'hang'"):
            await kit.finish(handle, timeout=SHORT)


async def test_finish_gives_up_on_what_goes_on_for_ever(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.testing.kit._MOST_MOVES", 3)
    app = App("kit")

    @app.workflow
    async def flow() -> None:
        while True:
            await sleep(DAY)

    async with bed(app) as kit:
        with pytest.raises(
            TimeoutError, match=r"'flow' is still waiting at .*, after 3 moves of the clock; if it goes"
        ):
            await kit.run(flow())


async def test_finish_raises_what_the_workflow_failed_with(bed: Bed) -> None:
    class Refused(Exception): ...

    app = App("kit", errors=[Refused])

    @app.workflow
    async def flow() -> None:
        await sleep(DAY)
        raise Refused("no funds")

    async with bed(app) as kit:
        with pytest.raises(Refused, match="no funds"):
            await kit.run(flow())


async def test_foreign_awaits_are_errors_in_a_test(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> None:
        await asyncio.sleep(1)

    async with bed(app) as kit:
        with pytest.raises(ForeignAwait, match=r"asyncio\.sleep"):
            await kit.run(flow())


async def test_foreign_timers_are_still_found_after_a_replay_and_another_kit(bed: Bed) -> None:
    app, other = App("kit"), App("other")

    @app.workflow
    async def hasty() -> None:
        await asyncio.sleep(0.001)  # over before anybody looks at what lasts

    @other.workflow
    async def nothing() -> str:
        return "done"

    async with bed(app) as kit:
        async with bed(other) as other_kit:
            handle = await other.start(nothing())
            assert await other_kit.finish(handle) == "done"
            await other_kit.replay(handle)
        with pytest.raises(ForeignAwait, match=r"asyncio\.sleep"):
            await kit.run(hasty())


async def test_the_second_of_two_kits_may_outlive_the_first(bed: Bed) -> None:
    app, other = App("kit"), App("other")

    @other.workflow
    async def hasty() -> None:
        await asyncio.sleep(0.001)

    first, second = bed(app), bed(other)
    await first.__aenter__()
    kit = await second.__aenter__()
    await first.__aexit__(None, None, None)
    with pytest.raises(ForeignAwait):
        await kit.run(hasty())
    await second.__aexit__(None, None, None)


async def test_a_crash_loses_what_was_not_durable_and_nothing_else(bed: Bed, ran: list[str]) -> None:
    app = App("kit")
    entered = asyncio.Event()

    @step
    async def first() -> str:
        ran.append("first")
        return str(uuid4.__name__)

    @step
    async def second() -> None:
        ran.append("second")
        entered.set()
        if ran.count("second") == 1:
            await asyncio.Event().wait()

    @app.workflow
    async def flow() -> str:
        value = await first()
        await second()
        return value

    async with bed(app) as kit:
        handle = await app.start(flow())
        await entered.wait()
        kit.crash()
        assert await kit.finish(handle) == "uuid4"
        assert ran == ["first", "second", "second"]
        assert (await handle.describe()).recoveries == 1


async def test_a_workflow_waits_while_there_is_no_worker(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> str:
        return "done"

    async with bed(app) as kit:
        await kit.stop_worker()
        handle = await app.start(flow())
        assert await handle.status() is Status.PENDING
        with pytest.raises(RuntimeError, match="no worker at the moment"):
            await kit.idle()
        await kit.start_worker()
        assert await kit.finish(handle) == "done"


# --- what is left -----------------------------------------------------------------------------------------------------


async def test_the_app_and_the_server_are_afterwards_what_they_were(bed: Bed, database_url: str) -> None:
    app = App("kit", database_url="postgresql://nowhere", schema="mine")

    @app.workflow
    async def flow() -> str:
        return "done"

    before = app.settings
    with pytest.raises(ZeroDivisionError):
        async with bed(app) as kit:
            schema = kit.schema
            assert await kit.run(flow()) == "done"
            assert app.settings.schema == schema != "mine"
            raise ZeroDivisionError
    assert (app.settings, app.sessions()) == (before, [])
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        cursor = await connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema,))
        assert await cursor.fetchone() == (0,)


async def test_two_apps_have_a_clock_each(bed: Bed) -> None:
    one, other = App("one"), App("other")

    @one.workflow
    async def first() -> str:
        await sleep(DAY)
        return "first"

    @other.workflow
    async def second() -> str:
        await sleep(DAY)
        return "second"

    async with bed(one) as kit, bed(other) as second_kit:
        handles = await one.start(first()), await other.start(second())
        await kit.clock.advance(DAY)
        assert await handles[0].result() == "first"
        await second_kit.idle()
        assert await handles[1].status() is Status.WAITING
        assert await second_kit.finish(handles[1]) == "second"


async def test_one_app_can_be_tested_again_and_again(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> str:
        return "done"

    schemas = set[str]()
    for _ in range(2):
        async with bed(app) as kit:
            schemas.add(kit.schema)
            assert await kit.run(flow(), key="the same") == "done"
            assert len([each async for each in app.workflows()]) == 1
    assert len(schemas) == 2


async def test_blocking_verbs_in_a_thread_meet_the_same_workflows(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> str:
        await sleep(DAY)
        return "done"

    async with bed(app) as kit:
        handle = await asyncio.to_thread(app.blocking.start, flow())
        await kit.clock.advance(DAY)
        assert await asyncio.to_thread(handle.result) == "done"
    assert app.sessions() == []


async def test_a_transaction_that_was_left_open_is_told(
    bed: Bed, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_LOCK_TIMEOUT", "100ms")
    async with await psycopg.AsyncConnection.connect(database_url) as left_open:
        with pytest.raises(TimeoutError, match="a transaction that uses it is still open; end it within the block"):
            async with bed(App("kit")) as kit:
                await left_open.execute(f'SELECT * FROM "{kit.schema}".workflow_rows')
    await place.drop(database_url, kit.schema)


async def test_schemas_of_tests_that_were_killed_are_swept_and_no_others(
    bed: Bed, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten, recent, mine = f"perdure_test_{1:08x}_0123456789", place.new_schema(), "perdure_test_cafe"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        for schema in (forgotten, recent, mine):
            await connection.execute(f'CREATE SCHEMA "{schema}"')
        monkeypatch.setattr(place, "_swept", set[str]())
        async with bed(App("kit")):
            pass
        cursor = await connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname = ANY (%s) ORDER BY 1", ([forgotten, recent, mine],)
        )
        assert {row[0] for row in await cursor.fetchall()} == {recent, mine}
        for schema in (recent, mine):
            await connection.execute(f'DROP SCHEMA "{schema}"')

"""Retention: what has been over for long enough is deleted, with all that hangs on it, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from acceptance.support import SOON
from engine.support import FaultyDatabase
from perdure import App, Client, Retry, WorkflowNotFound, WrongState, sleep, step, telemetry
from perdure.engine.loop import Turns
from perdure.engine.maintenance import Maintenance

Sql = Callable[..., list[Any]]
DAY = 86_400.0
TABLES = ("workflow_rows", "checkpoints", "queue_entries", "waits", "deadlines", "running_steps")


def left(sql: Sql) -> list[str]:
    """The names of the workflows that are there."""
    return sorted(name for (name,) in sql("SELECT name FROM workflow_rows"))


async def ended(app: App, *invocations: Any) -> list[Any]:
    async with app.worker():
        handles = [await app.start(invocation) for invocation in invocations]
        for handle in handles:
            await asyncio.wait({asyncio.ensure_future(_over(handle))})
    return handles


async def _over(handle: Any) -> None:
    try:
        await handle.result(timeout=SOON)
    except ValueError:
        pass


async def test_what_has_ended_is_kept_for_thirty_days(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow
    async def flow() -> None: ...

    await ended(app, flow())
    clock.advance(29 * DAY)
    assert await app.prune() == 0
    clock.advance(2 * DAY)
    assert await app.prune(dry_run=True) == 1
    assert left(sql) == ["flow"]
    assert await app.prune() == 1
    assert left(sql) == []


async def test_apps_and_workflows_say_how_long(database_url: str, schema: str, sql: Sql) -> None:
    async with App("tests", database_url=database_url, schema=schema, retention=timedelta(days=5)) as app:

        @app.workflow
        async def usual() -> None: ...

        @app.workflow(retention=timedelta(days=1))
        async def short() -> None: ...

        @app.workflow(retention=None)
        async def for_ever() -> None: ...

        await ended(app, usual(), short(), for_ever())
        for days, rest in ((2, ["for_ever", "usual"]), (6, ["for_ever"]), (10_000, ["for_ever"])):
            sql("UPDATE checkpoints SET created_at = now() - make_interval(days => %s) WHERE key = '$result'", days)
            sql("UPDATE workflow_rows SET created_at = now() - make_interval(days => %s)", days)
            await app.prune()
            assert left(sql) == rest


async def test_keep_overrules_them_and_a_name_narrows_it(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow(retention=None)
    async def first() -> None: ...

    @app.workflow
    async def second() -> None: ...

    await ended(app, first(), second())
    clock.advance(2 * DAY)
    assert await app.prune(keep=timedelta(days=3)) == 0
    assert await app.prune(keep=timedelta(days=1), name="first") == 1
    assert left(sql) == ["second"]
    with pytest.raises(ValueError, match="use 0 or more"):
        await app.prune(keep=timedelta(days=-1))


async def test_what_has_not_ended_stays_however_old_it_is(app: App, sql: Sql, clock: Any, events: Any) -> None:
    repaired = False

    @step
    async def fragile() -> str:
        if not repaired:
            raise ValueError("broken")
        return "mended"

    @app.workflow
    async def asleep() -> None:
        await sleep(timedelta(days=1000))

    @app.workflow
    async def waits_to_start() -> None: ...

    @app.workflow
    async def resumed() -> str:
        return await fragile()

    async with app.worker():
        await app.start(asleep())
        failed = await app.start(resumed())
        with pytest.raises(ValueError, match="broken"):
            await failed.result(timeout=SOON)
        await events.wait_for(telemetry.WorkflowSuspended)
    await app.start(waits_to_start())
    await failed.resume()
    clock.advance(500 * DAY)
    assert await app.prune(keep=timedelta(0)) == 0
    assert left(sql) == ["asleep", "resumed", "waits_to_start"]
    repaired = True
    async with app.worker():
        assert await failed.result(timeout=SOON) == "mended"


async def test_everything_goes_with_it_and_its_key_is_free(app: App, sql: Sql, clock: Any) -> None:
    @step(retry=Retry(max_attempts=2, initial=timedelta(0)))
    async def fail() -> None:
        raise ValueError("always")

    @app.workflow(timeout=timedelta(days=1))
    async def flow() -> None:
        await fail()

    async with app.worker():
        handle = await app.start(flow(), key="order-1")
        with pytest.raises(ValueError, match="always"):
            await handle.result(timeout=SOON)
    clock.advance(31 * DAY)
    assert await app.prune() == 1
    assert {table: sql(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES} == dict.fromkeys(TABLES, 0)
    with pytest.raises(WorkflowNotFound):
        await handle.status()
    assert await app.find("flow", key="order-1") is None
    assert (await app.start(flow(), key="order-1")).started


async def test_it_goes_in_chunks_over_all_of_them(app: App, sql: Sql, clock: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("perdure.engine.maintenance.CHUNK", 7)

    @app.workflow
    async def flow(number: int) -> int:
        return number

    async with app.worker():
        handles = await app.start_many([flow(number) for number in range(30)])
        for handle in handles:
            await handle.result(timeout=SOON)
    clock.advance(31 * DAY)
    assert await app.prune() == 30
    assert left(sql) == []


async def test_a_worker_does_it_by_itself_from_where_another_one_stopped(
    app: App, sql: Sql, clock: Any, events: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("perdure.engine.maintenance.CHUNK", 2)

    @app.workflow
    async def flow(number: int) -> int:
        return number

    async with app.worker():
        handles = await app.start_many([flow(number) for number in range(6)])
        for handle in handles:
            await handle.result(timeout=SOON)
    clock.advance(31 * DAY)
    ids = sorted(handle.id for handle in handles)
    # Somebody has looked at the first three, and died.
    sql("UPDATE maintenance SET cursor = %s, next_at = now() WHERE job = 'retention'", ids[2])
    async with app.worker():
        await events.wait_for(telemetry.WorkflowsDeleted)
        await events.wait_for(
            telemetry.WorkflowsDeleted, lambda _: sum(each.count for each in events.of(telemetry.WorkflowsDeleted)) >= 3
        )
    assert set(ids[:3]) <= {id for (id,) in sql("SELECT id FROM workflow_rows")}


async def test_one_worker_at_a_time_does_it(app: App, sql: Sql, clock: Any) -> None:
    await app.session().database.attempt("clock")
    taken = [await app.session().database.attempt("take_job", 1, "retention", 60.0) for _ in range(3)]
    assert [len(rows) for rows in taken] == [1, 0, 0]
    clock.advance(61)
    assert len(await app.session().database.attempt("take_job", 1, "retention", 60.0)) == 1


async def test_it_holds_up_neither_starts_nor_flushes(
    app: App, sql: Sql, clock: Any, database_url: str, schema: str
) -> None:
    """Somebody's open transaction has the row that is to be deleted: the deletion waits, and nothing else does."""

    @app.workflow
    async def flow() -> str:
        return "done"

    (old,) = await ended(app, flow())
    clock.advance(31 * DAY)
    async with await psycopg.AsyncConnection.connect(database_url, options=f"-c search_path={schema}") as somebody:
        await somebody.execute("SELECT FROM checkpoints WHERE workflow_id = %s FOR UPDATE", (old.id,))
        pruning = asyncio.ensure_future(app.prune())
        async with app.worker():
            assert await app.run(flow()) == "done"
        assert not pruning.done()
        await somebody.rollback()
        assert await pruning == 1


async def test_a_key_that_somebody_takes_over_in_an_open_transaction_holds_up_no_start_under_another(
    app: App, sql: Sql, clock: Any, database_url: str, schema: str
) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker():
        for key in ("mine", "theirs"):
            await (await app.start(flow(), key=key)).result(timeout=SOON)
    clock.advance(31 * DAY)
    async with await psycopg.AsyncConnection.connect(database_url) as somebody:
        await app.start(flow(), key="theirs", on_conflict="replace_finished", connection=somebody)
        async with asyncio.timeout(10):
            assert await app.prune() == 1
            assert (await app.start(flow(), key="mine")).started
        await somebody.rollback()
    assert await app.prune() == 1


async def test_a_client_whose_clock_is_slow_hides_nothing_from_it(
    app: App, sql: Sql, clock: Any, monkeypatch: Any
) -> None:
    """Ids are made by clients, and so is their order: what stands in front may be young."""
    monkeypatch.setattr("perdure.engine.maintenance.CHUNK", 2)

    @app.workflow
    async def old() -> None: ...

    @app.workflow
    async def young() -> None: ...

    await ended(app, old(), old(), old())
    clock.advance(31 * DAY)
    handle = await app.start(young())
    sql("UPDATE workflow_rows SET id = %s WHERE id = %s", UUID(int=1), handle.id)
    assert await app.prune() == 3
    assert left(sql) == ["young"]


async def test_what_a_dead_worker_left_of_its_running_steps_goes_too(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow
    async def flow() -> None: ...

    (handle,) = await ended(app, flow())
    sql(
        "INSERT INTO running_steps (shard, workflow_id, key, worker_id, epoch, attempt, started_at) "
        "VALUES (1, %s, 'step', gen_random_uuid(), 1, 1, now())",
        handle.id,
    )
    clock.advance(31 * DAY)
    assert await app.prune() == 1
    assert sql("SELECT * FROM running_steps") == []


async def test_only_what_has_ended_can_be_deleted(app: App, database_url: str) -> None:
    @app.workflow
    async def flow() -> None: ...

    handle = await app.start(flow(), delay=timedelta(days=1))
    with pytest.raises(WrongState, match="only what has ended can be deleted"):
        await handle.delete()
    await handle.cancel()
    await handle.delete()
    with pytest.raises(WorkflowNotFound):
        await handle.delete()
    async with Client(database_url, schema=app.settings.schema) as client:
        with pytest.raises(WorkflowNotFound):
            await client.handle(uuid4()).delete()
        assert await client.delete_many(name="flow") == []


def test_a_retention_in_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="use 0 or more, or None"):
        App("tests", retention=timedelta(days=-1))


async def test_a_deletion_that_gets_no_answer_ends_no_worker_and_is_tried_again_with_fewer(
    app: App, sql: Sql, clock: Any
) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    await ended(app, flow(), flow())
    clock.advance(31 * DAY)
    database = FaultyDatabase(replace(app.settings, connect_timeout=timedelta(milliseconds=20)), pool_size=2)
    plan = database.lose_request("delete_ended", times=3)
    maintenance = Maintenance(database, {}, turns=Turns())
    running = asyncio.ensure_future(maintenance.run())
    try:
        await plan.happened.wait()
        sql("UPDATE maintenance SET next_at = 'epoch'")
        while sql("SELECT count(*) FROM workflow_rows") != [(0,)]:
            assert not running.done(), running.exception()
            sql("UPDATE maintenance SET next_at = 'epoch'")
            await asyncio.sleep(0.02)
    finally:
        running.cancel()
        await asyncio.wait({running})
        await database.close()

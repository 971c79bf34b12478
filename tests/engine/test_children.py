"""Children: started once and heard of, whatever order things happen in, and whatever is lost on the way."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from perdure import App, Client, Handle, WorkflowCancelled, step, telemetry
from perdure.engine.children import Children
from perdure.engine.writer import Writer
from perdure.model.ids import first_id, new_id
from perdure.model.records import Checkpoint, Suspension
from perdure.store.programs import NewWorkflow
from perdure.store.statements import SHARD

from .support import FakeRun, FaultyDatabase, Gate, Sql, outcome, register, start

SOON = timedelta(seconds=30)
NOW = timedelta(0)


async def held(database: FaultyDatabase, me: UUID, count: int = 1) -> list[FakeRun]:
    return [FakeRun(id, me) for id in await start(database, count, worker_id=me)]


def bears(writer: Writer, parent: FakeRun, key: str = "child") -> UUID:
    """The parent starts a child, in the queue of its own."""
    new = NewWorkflow(id=new_id(), name="flow", queue="q", input="{}", parent_id=parent.id)
    writer.record(parent, Checkpoint(f"{key}#c", "start", 1, "success", f'"{new.id}"'), new)  # type: ignore[arg-type]
    return new.id


def rests(writer: Writer, parent: FakeRun) -> None:
    writer.suspend(parent, Suspension("child", None, 0, awaits_child=True))  # type: ignore[arg-type]


def a_child_of(parent: FakeRun, sql: Sql, child: FakeRun) -> FakeRun:
    """That run is one of a child."""
    sql("UPDATE queue_entries SET parent_id = %s WHERE workflow_id = %s", parent.id, child.id)
    child.parent_id = parent.id
    return child


async def told(database: FaultyDatabase) -> Any:
    (found,) = await database.attempt("wake_parents", SHARD, 100, first_id(None))
    return found


# --- starting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lose_answer", "lose_request"])
@pytest.mark.parametrize("with_end", [False, True])
async def test_children_of_a_flush_in_doubt_are_there_once(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, fault: str, with_end: bool
) -> None:
    (parent,) = await held(database, me)
    getattr(database, fault)("settle")
    children = [bears(writer, parent, f"child{number}") for number in range(3)]
    if with_end:
        writer.complete(parent, "success", "1")  # type: ignore[arg-type]
    await writer.drained()
    assert (parent.durable, parent.queues, parent.loss) == (3, {"q"}, None)
    rows = sql("SELECT id, parent_id FROM workflow_rows WHERE parent_id IS NOT NULL ORDER BY id")
    assert rows == [(id, parent.id) for id in sorted(children)]
    assert sql("SELECT count(*) FROM queue_entries WHERE parent_id IS NOT NULL") == [(3,)]


async def test_children_of_a_run_that_was_taken_over_are_not_started(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    parent, other = await held(database, me, 2)
    heir = await register(database)
    sql("UPDATE queue_entries SET worker_id = %s, epoch = 2 WHERE workflow_id = %s", heir, parent.id)
    bears(writer, parent)
    kept = bears(writer, other)
    await writer.drained()
    assert parent.loss is not None
    assert sql("SELECT id FROM workflow_rows WHERE parent_id IS NOT NULL") == [(kept,)]


async def test_thousands_of_children_are_started_in_several_flushes_each_with_its_checkpoint(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (parent,) = await held(database, me)
    children = [bears(writer, parent, f"child{number}") for number in range(2000)]
    writer.record(parent, outcome("last", position=2))  # type: ignore[arg-type]
    await writer.drained()
    assert parent.durable == 2001
    assert database.sent.count("settle") > 2
    unmatched = (
        "SELECT count(*) FROM checkpoints JOIN workflow_rows ON (payload #>> '{}')::uuid = workflow_rows.id "
        "WHERE kind = 'start'"
    )
    assert sql(unmatched) == [(len(children),)]


async def test_a_parent_that_is_lost_in_the_middle_of_a_fan_out_goes_on_with_those_that_it_has(
    app: App, faulty: FaultyDatabase, client: Client, sql: Sql
) -> None:
    @app.job
    async def square(number: int) -> int:
        return number * number

    @app.workflow
    async def fans_out(count: int) -> int:
        return sum(await asyncio.gather(*(square(number) for number in range(count))))

    handle: Handle[int] = await client.start(fans_out(1500))
    first = faulty.hold_answer("settle")
    async with app.worker(grace=NOW) as worker:
        await first.happened.wait()  # some are started, and nobody has been told
        worker.executor.abandon("the test lost it")
        first.leave.set()
        assert await handle.result(timeout=SOON) == sum(number * number for number in range(1500))
    assert sql("SELECT count(*) FROM workflows WHERE parent_id IS NOT NULL") == [(1500,)]


# --- being told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["the child ends first", "the parent rests first", "in one flush"])
async def test_a_parent_that_leaves_memory_while_its_child_ends_is_woken(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, order: str
) -> None:
    parent, child = await held(database, me, 2)
    a_child_of(parent, sql, child)
    if order == "the child ends first":
        writer.complete(child, "success", "1")  # type: ignore[arg-type]
        await writer.drained()
        await told(database)
        rests(writer, parent)
        await writer.drained()
        assert parent.is_awoken, "it was counted up, so it stays"
        return
    rests(writer, parent)
    if order == "the parent rests first":
        await writer.drained()
    writer.complete(child, "success", "1")  # type: ignore[arg-type]
    await writer.drained()
    assert parent.is_suspended
    assert (await told(database)).queues == ["q"]
    assert sql("SELECT workflow_id, worker_id, epoch FROM queue_entries") == [(parent.id, None, 1)]
    assert sql("SELECT count(*) FROM outbox") == sql("SELECT count(*) FROM waits") == [(0,)]


async def test_a_note_for_a_parent_that_moves_in_this_moment_stays_for_the_next_look(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, database_url: str, schema: str
) -> None:
    parent, child = await held(database, me, 2)
    a_child_of(parent, sql, child)
    writer.complete(child, "success", "1")  # type: ignore[arg-type]
    await writer.drained()
    # The parent's suspension is under way: its entry is deleted and its waits row inserted, and neither is committed.
    moving = psycopg.connect(database_url, options=f"-c search_path={schema}")
    with moving:
        moving.execute(
            "INSERT INTO waits (shard, workflow_id, waiting_for, queue, name, enqueued_at, epoch, awaits_child, "
            "created_at) SELECT shard, workflow_id, 'child', queue, name, enqueued_at, epoch, true, now() "
            "FROM queue_entries"
        )
        moving.execute("DELETE FROM queue_entries")
        looking = asyncio.create_task(told(database))
        while not sql("SELECT 1 FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0)
        moving.commit()
    found = await looking
    assert (found.running, found.queues, found.left) == ([], [], 1)
    assert (await told(database)).queues == ["q"]
    assert sql("SELECT count(*) FROM outbox") == [(0,)]


async def test_a_note_that_a_dead_worker_left_behind_is_found_by_another(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    gate = Gate()

    @step
    async def hold() -> None:
        await gate.pass_through()

    @app.workflow
    async def child() -> str:
        await hold()
        return "done"

    @app.workflow
    async def parent() -> str:
        return await child()

    async with app.worker(grace=NOW):
        handle: Handle[str] = await client.start(parent())
        await gate.has(1)
        await events.wait_for(telemetry.WorkflowSuspended, lambda event: event.name == "parent")
        left = faulty.lose_request("wake_parents", times=1000)
        gate.open()
        await left.happened.wait()
        assert sql("SELECT target_id FROM outbox") == [(handle.id,)]
    left.left = 0
    async with app.worker():
        assert await handle.result(timeout=SOON) == "done"


async def test_notes_for_those_that_have_ended_or_are_gone_or_sleep_are_taken(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    ended, sleeper = await held(database, me, 2)
    writer.complete(ended, "success", "1")  # type: ignore[arg-type]
    writer.suspend(sleeper, Suspension("timer", None, 0))  # type: ignore[arg-type]
    await writer.drained()
    for target in (ended.id, sleeper.id, uuid4()):
        sql("INSERT INTO outbox VALUES (1, gen_random_uuid(), %s, NULL, now())", target)
    found = await told(database)
    assert (found.running, found.queues, found.left) == ([], [], 0)
    assert sql("SELECT count(*) FROM outbox") == [(0,)]
    assert sql("SELECT workflow_id FROM waits") == [(sleeper.id,)], "its time hasn't come"


# --- ending with the parent -----------------------------------------------------------------------------------------


async def test_children_are_cancelled_by_the_next_run_if_this_one_dies_before_it_has_asked_them(
    app: App, client: Client, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, asked = Gate(), asyncio.Event()

    @step
    async def hold() -> None:
        await gate.pass_through()

    @app.workflow
    async def child() -> None:
        await hold()

    @app.workflow
    async def parent() -> None:
        await child()

    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    async with app.worker() as worker:
        handle: Handle[None] = await client.start(parent())
        await gate.has(1)
        with monkeypatch.context() as patch:
            patch.setattr(worker.executor, "cancel_children", never)
            await handle.cancel()
            await asked.wait()
            assert sql("SELECT status FROM workflows WHERE name = 'child'") == [("running",)]
        worker.executor.drop([handle.id], "the test lost it")
        worker._claimer.doubt()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
        (info,) = [each async for each in client.workflows(name="child")]
        with pytest.raises(WorkflowCancelled, match="its parent was cancelled"):
            await client.handle(info.id).result(timeout=SOON)
        gate.open()


@pytest.mark.parametrize("how", ["cancelled", "terminated"])
async def test_a_child_that_never_ran_is_heard_of_all_the_same(app: App, client: Client, how: str, events: Any) -> None:
    @app.workflow(queue="nobody serves it")
    async def child() -> None: ...

    @app.workflow
    async def parent() -> str:
        try:
            await child()
        except WorkflowCancelled:
            return "it was cancelled"
        raise AssertionError

    async with app.worker(queues=["default"]):
        handle: Handle[str] = await client.start(parent())
        await events.wait_for(telemetry.WorkflowSuspended)
        (info,) = [each async for each in client.workflows(name="child")]
        if how == "cancelled":
            await client.handle(info.id).cancel()
        else:
            await client.handle(info.id).terminate()
        assert await handle.result(timeout=SOON) == "it was cancelled"


def test_a_child_that_ended_before_its_parent_knows_of_its_birth_is_looked_for_then() -> None:
    """Its flush got no answer, another worker was quick, and its note was found: that look can't find it yet."""
    children, child = Children({}), new_id()
    children.conceive(child, 1)
    children.wait(child, "child")
    children.is_looked_for = True
    assert children.look() == []
    children.looked(again=False)
    assert children.is_looked_for, "the parent must not leave memory: the note is gone"
    assert children.written(1)
    assert children.look() == [child]
    children.looked(again=False)
    assert not children.is_looked_for
    assert not children.written(1)

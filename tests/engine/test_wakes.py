"""PROTOCOLS §§9, 10: whoever suspends and whoever has something for a workflow, in every order."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from perdure import App, Client, Handle, Retry, Status, WorkflowCancelled, WrongState, now, sleep, step, telemetry
from perdure.engine.bloat import Bloat
from perdure.engine.delivery import Delivery
from perdure.engine.loop import Turns
from perdure.engine.timers import Timers
from perdure.engine.writer import Writer
from perdure.model.records import Checkpoint, Suspension
from perdure.store.arrays import BigInts, Texts, Uuids
from perdure.store.statements import SHARD, statements
from perdure.worker import WorkerOptions

from .support import (
    FakeRun,
    FaultyDatabase,
    Gate,
    LeaseDatabases,
    Sql,
    flush_blocked,
    outcome,
    start,
    until,
    waits_for_a_lock,
)

HOUR = timedelta(hours=1)
LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)
DOZING = WorkerOptions(lease=LONG, suspends_from=timedelta(milliseconds=100))
PARKING = Retry(max_attempts=1)
SAID = json.dumps({"by": "$cancel", "reason": "enough"})
RESULT = json.dumps({"type": "perdure.errors.WorkflowCancelled", "message": "enough", "args": ["enough"]})

Deed = tuple[str, list[Any]]


def cancelling(*ids: UUID) -> Deed:
    return "cancel", [SHARD, list(ids), "$cancel", SAID, "$cancel#again", "cancelled", RESULT]


def terminating(*ids: UUID) -> Deed:
    return "terminate", [SHARD, list(ids), RESULT]


def resuming(*ids: UUID) -> Deed:
    return "resume_parked", [SHARD, list(ids), "token"]


def sending(*ids: UUID) -> Deed:
    count = len(ids)
    new = [uuid4() for _ in ids]
    return "send", [
        SHARD,
        list(ids),
        new,
        list(ids),
        [0] * count,
        ["topic"] * count,
        ["1"] * count,
        [None] * count,
        False,
    ]


def waking() -> Deed:
    return "wake_due", [SHARD, 100, None]


@asynccontextmanager
async def done_but_not_committed(
    url: str, schema: str, deed: Deed
) -> AsyncIterator[tuple[psycopg.AsyncConnection[Any], list[Any]]]:
    """A statement of perdure in a transaction that is still open, and its rows; `commit()` it in the block."""
    name, params = deed
    async with await psycopg.AsyncConnection.connect(url) as connection:
        cursor = psycopg.AsyncRawCursor(connection)
        await cursor.execute(statements(schema)[name].text, params)
        yield connection, await cursor.fetchall()
        await connection.rollback()


async def do(database: FaultyDatabase, deed: Deed) -> list[Any]:
    name, params = deed
    return list(await database.attempt(name, *map(_as_array, params)))


def _as_array(param: Any) -> Any:
    if not isinstance(param, list):
        return param
    kinds: dict[type, Callable[..., Any]] = {UUID: Uuids, int: BigInts, str: Texts, type(None): Uuids}
    return kinds[type(param[0])](param)  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]


def parked_attempt(key: str = "step") -> Checkpoint:
    return Checkpoint(f"{key}#a1", "park", 0, "error", "{}")


def falls_asleep(writer: Writer, run: FakeRun, seconds: float | None = 3600, *, seen: int = 0) -> None:
    due = None if seconds is None else time.monotonic() + seconds
    writer.suspend(run, Suspension("operator" if due is None else "timer", due, seen, hears=True))


async def held(database: FaultyDatabase, me: UUID, count: int = 1) -> list[FakeRun]:
    return [FakeRun(id, me) for id in await start(database, count, worker_id=me)]


async def asleep(database: FaultyDatabase, writer: Writer, me: UUID, seconds: float | None = 3600) -> UUID:
    """A workflow that waits; without a time: for an operator, as one of its steps is parked."""
    (run,) = await held(database, me)
    if seconds is None:
        writer.record(run, parked_attempt())
    falls_asleep(writer, run, seconds)
    await writer.drained()
    assert run.is_suspended
    return run.id


def entries(sql: Sql) -> list[Any]:
    return sql("SELECT workflow_id, worker_id, epoch, wakes FROM queue_entries ORDER BY workflow_id")


def waits(sql: Sql) -> list[Any]:
    return sql("SELECT workflow_id, waiting_for, epoch FROM waits ORDER BY workflow_id")


def keys(sql: Sql, id: UUID) -> list[str]:
    return [key for (key,) in sql("SELECT key FROM checkpoints WHERE workflow_id = %s AND kind <> 'input'", id)]


# --- a suspension and whoever has something ------------------------------------------------------------------------


@pytest.mark.parametrize("asking", [cancelling, resuming, sending])
async def test_a_suspension_after_something_came_is_refused(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, asking: Callable[..., Deed]
) -> None:
    (run,) = await held(database, me)
    writer.record(run, parked_attempt())
    await run.told()
    assert len(await do(database, asking(run.id))) == 1
    falls_asleep(writer, run)
    await run.told()
    assert (run.is_awoken, run.is_suspended, run.loss) == (True, False, None)
    assert entries(sql) == [(run.id, me, 1, 1)]
    assert waits(sql) == []


async def test_a_suspension_that_has_seen_what_came_is_no_longer_refused(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    await do(database, cancelling(run.id))
    falls_asleep(writer, run, seen=1)
    await run.told()
    assert run.is_suspended
    assert (entries(sql), waits(sql)) == ([], [(run.id, "timer", 1)])


@pytest.mark.parametrize("asking", [cancelling, resuming, terminating, sending])
async def test_whoever_comes_while_a_suspension_is_being_written_finds_it_written(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    asking: Callable[..., Deed],
) -> None:
    """Its statement began before the suspension was committed: it sees neither entry nor wait, and begins again."""
    (run,) = await held(database, me)
    writer.record(run, parked_attempt())
    await run.told()
    async with flush_blocked(database_url, schema, run.id) as blocker:
        writer.record(run, outcome("step"))
        falls_asleep(writer, run)
        await waits_for_a_lock(sql, schema)
        asked = asyncio.ensure_future(do(database, asking(run.id)))
        await waits_for_a_lock(sql, schema, 2)
        await blocker.rollback()
        assert await asked == []
        await writer.drained()
    assert run.is_suspended
    assert (entries(sql), waits(sql)) == ([], [(run.id, "timer", 1)])
    assert not [key for key in keys(sql, run.id) if key.startswith("$")], "it wrote nothing"
    assert len(await do(database, asking(run.id))) == 1
    assert waits(sql) == []
    assert entries(sql) == ([] if asking is terminating else [(run.id, None, 1, 1 if asking is sending else 0)])


@pytest.mark.parametrize("asking", [cancelling, resuming, sending])
async def test_a_suspension_that_comes_while_something_is_being_written_waits_and_is_refused(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    asking: Callable[..., Deed],
) -> None:
    (run,) = await held(database, me)
    writer.record(run, parked_attempt())
    await run.told()
    async with done_but_not_committed(database_url, schema, asking(run.id)) as (asker, rows):
        assert len(rows) == 1
        falls_asleep(writer, run)
        await waits_for_a_lock(sql, schema)
        await asker.commit()
        await run.told()
    assert (run.is_awoken, run.is_suspended) == (True, False)
    assert (entries(sql), waits(sql)) == ([(run.id, me, 1, 1)], [])


async def test_a_suspension_that_comes_while_its_workflow_is_terminated_is_lost(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    (run,) = await held(database, me)
    async with done_but_not_committed(database_url, schema, terminating(run.id)) as (asker, _):
        writer.record(run, outcome("step"))
        falls_asleep(writer, run)
        await waits_for_a_lock(sql, schema)
        await asker.commit()
        await run.told()
    assert run.loss is not None
    assert (entries(sql), waits(sql), keys(sql, run.id)) == ([], [], ["$result"])


async def test_one_suspension_that_is_refused_takes_nothing_from_the_rest_of_its_flush(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    """A cancellation that was delivered, an end, two suspensions, one of them refused: in one flush."""
    blocked, told, ended, sleeper, asked = await held(database, me, 5)
    await do(database, cancelling(asked.id))
    async with flush_blocked(database_url, schema, blocked.id) as blocker:
        writer.record(blocked, outcome("step"))
        await waits_for_a_lock(sql, schema)
        writer.record(told, Checkpoint("$cancelled", "cancel", 1, "cancelled", SAID))
        writer.record(ended, outcome("step"))
        writer.complete(ended, "success", "1")
        for run in (sleeper, asked):
            writer.record(run, outcome("step"))
            falls_asleep(writer, run)
        await blocker.rollback()
        await writer.drained()
    last = events.of(telemetry.FlushCommitted)[-1]
    assert (last.workflows, last.checkpoints, last.ended, last.suspended) == (4, 4, 1, 1)
    assert [run.durable for run in (told, ended, sleeper, asked)] == [1, 1, 1, 1]
    assert ended.result is not None
    assert (sleeper.is_suspended, sleeper.is_awoken) == (True, False)
    assert (asked.is_suspended, asked.is_awoken) == (False, True)
    assert waits(sql) == [(sleeper.id, "timer", 1)]
    assert {row[0] for row in entries(sql)} == {blocked.id, told.id, asked.id}


async def test_what_a_suspension_sets_aside_is_set_aside_also_where_it_is_refused(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    """The whole workflow is tried again: its next run comes at once, and must ask anew for what it failed from."""
    (run,) = await held(database, me)
    writer.record(run, outcome("step"))
    await run.told()
    await do(database, cancelling(run.id))
    writer.suspend(run, Suspension("retry", time.monotonic() + 60, 0, ("step",)))
    await run.told()
    assert run.is_awoken
    assert "step" not in keys(sql, run.id)
    assert sql("SELECT kind FROM checkpoints WHERE key LIKE '$history/%/step'") == [("history",)]


# --- an end, and whoever has something -----------------------------------------------------------------------------


@pytest.mark.parametrize("asking", [cancelling, terminating, sending])
async def test_whoever_comes_while_a_result_is_being_written_comes_too_late(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    client: Client,
    asking: Callable[..., Deed],
) -> None:
    (run,) = await held(database, me)
    handle = client.handle(run.id)
    async with flush_blocked(database_url, schema, run.id) as blocker:
        writer.record(run, outcome("step"))
        writer.complete(run, "success", "1")
        await waits_for_a_lock(sql, schema)
        verbs = {cancelling: handle.cancel, terminating: handle.terminate, sending: lambda: handle.send("topic", 1)}
        asked = asyncio.ensure_future(verbs[asking]())
        await waits_for_a_lock(sql, schema, 2)
        await blocker.rollback()
        with pytest.raises(WrongState, match="success"):
            await asked
    assert sorted(keys(sql, run.id)) == ["$result", "step"]
    assert await handle.result() == 1


async def test_a_result_that_comes_while_a_cancellation_is_being_written_is_the_result(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str, client: Client
) -> None:
    """Asked for in time, but its code had ended before it could be told."""
    (run,) = await held(database, me)
    async with done_but_not_committed(database_url, schema, cancelling(run.id)) as (asker, rows):
        assert len(rows) == 1
        writer.complete(run, "success", "1")
        await waits_for_a_lock(sql, schema)
        await asker.commit()
        await run.told()
    assert run.result == ("success", "1")
    assert entries(sql) == []
    assert await client.handle(run.id).result() == 1
    assert await client.handle(run.id).status() is Status.SUCCESS


@pytest.mark.parametrize("asking", [cancelling, resuming])
async def test_an_end_among_suspensions_takes_its_entry_away_also_if_something_has_just_come(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    asking: Callable[..., Deed],
) -> None:
    """The entry has changed since the flush's statement began: what it deletes is the newest version."""
    ending, sleeper, going = await held(database, me, 3)
    writer.record(ending, parked_attempt())
    await ending.told()
    async with done_but_not_committed(database_url, schema, asking(ending.id)) as (asker, rows):
        assert len(rows) == 1
        writer.record(going, outcome("step"))
        writer.complete(ending, "success", "1")
        falls_asleep(writer, sleeper)
        await waits_for_a_lock(sql, schema)
        await asker.commit()
        await writer.drained()
    assert (ending.result, sleeper.is_suspended, going.durable) == (("success", "1"), True, 1)
    assert [row[0] for row in entries(sql)] == [going.id]
    assert waits(sql) == [(sleeper.id, "timer", 1)]


async def test_a_result_that_comes_while_its_workflow_is_terminated_is_thrown_away(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str, client: Client
) -> None:
    (run,) = await held(database, me)
    async with done_but_not_committed(database_url, schema, terminating(run.id)) as (asker, _):
        writer.record(run, outcome("step"))
        writer.complete(run, "success", "1")
        await waits_for_a_lock(sql, schema)
        await asker.commit()
        await run.told()
    assert (run.result, run.durable) == (None, 0)
    assert run.loss is not None
    assert keys(sql, run.id) == ["$result"]
    with pytest.raises(WorkflowCancelled, match="enough"):
        await client.handle(run.id).result()


async def test_a_claim_that_is_under_way_makes_a_cancellation_a_request(
    database: FaultyDatabase, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    """When its statement began, the workflow had never run; when it got the lock, it ran."""
    (id,) = await start(database)
    claim = "claim", [SHARD, me, "q", ["flow"], 1, None, "1"]
    async with done_but_not_committed(database_url, schema, claim) as (claimer, rows):
        assert len(rows) == 1
        asked = asyncio.ensure_future(do(database, cancelling(id)))
        await waits_for_a_lock(sql, schema)
        await claimer.commit()
        (row,) = await asked
    assert not row.ended
    assert entries(sql) == [(id, me, 1, 1)]
    assert keys(sql, id) == ["$cancel"]


async def test_a_claim_passes_by_what_is_being_cancelled_before_it_ran(
    database: FaultyDatabase, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    (id,) = await start(database)
    async with done_but_not_committed(database_url, schema, cancelling(id)) as (asker, rows):
        assert len(rows) == 1
        assert list(await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 1, None, "1")) == []
        await asker.commit()
    assert list(await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 1, None, "1")) == []
    assert (entries(sql), keys(sql, id)) == ([], ["$result"])


# --- a wait that is due, and whoever has something -----------------------------------------------------------------


@pytest.mark.parametrize("asking", [cancelling, resuming, terminating, sending])
async def test_whoever_comes_while_a_timer_wakes_a_workflow_finds_it_awake(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    asking: Callable[..., Deed],
) -> None:
    (run,) = await held(database, me)
    writer.record(run, parked_attempt())
    falls_asleep(writer, run, 0.0)
    await writer.drained()
    async with done_but_not_committed(database_url, schema, waking()) as (timer, rows):
        assert len(rows) == 1
        asked = asyncio.ensure_future(do(database, asking(run.id)))
        await waits_for_a_lock(sql, schema)
        await timer.commit()
        assert await asked == []
    assert (entries(sql), waits(sql)) == ([(run.id, None, 1, 0)], [])
    assert len(await do(database, asking(run.id))) == 1
    assert entries(sql) == ([] if asking is terminating else [(run.id, None, 1, 1)])


@pytest.mark.parametrize("asking", [cancelling, resuming, terminating, sending])
async def test_a_timer_passes_by_what_is_being_woken_and_wakes_nothing_twice(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    asking: Callable[..., Deed],
) -> None:
    (run,) = await held(database, me)
    writer.record(run, parked_attempt())
    falls_asleep(writer, run, 0.0)
    await writer.drained()
    async with done_but_not_committed(database_url, schema, asking(run.id)) as (asker, rows):
        assert len(rows) == 1
        async with asyncio.timeout(5):
            assert await do(database, waking()) == []
        await asker.commit()
    assert await do(database, waking()) == []
    assert waits(sql) == []
    assert entries(sql) == ([] if asking is terminating else [(run.id, None, 1, 1 if asking is sending else 0)])


async def test_of_many_timers_one_wakes_each_workflow(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    runs = await held(database, me, 60)
    for run in runs:
        falls_asleep(writer, run, 0.0)
    await writer.drained()
    await asyncio.gather(*(database.attempt("wake_due", SHARD, 7, None) for _ in range(30)))
    while waits(sql):
        await database.attempt("wake_due", SHARD, 7, None)
    assert entries(sql) == [(run.id, None, 1, 0) for run in sorted(runs, key=lambda run: run.id)]


async def test_what_wakes_keeps_its_place_and_its_epoch(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    place = "SELECT workflow_id, queue, name, priority, enqueued_at, started_at, epoch, recoveries FROM {}"
    (run,) = await held(database, me)
    before = sql(place.format("queue_entries"))
    falls_asleep(writer, run, 0.0)
    await writer.drained()
    assert sql(place.format("waits")) == before
    await do(database, waking())
    assert sql(place.format("queue_entries")) == before


async def test_two_who_resume_a_parked_step_at_the_same_time_wake_it_once(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    id = await asleep(database, writer, me, None)
    async with done_but_not_committed(database_url, schema, resuming(id)) as (first, rows):
        assert len(rows) == 1
        second = asyncio.ensure_future(database.attempt("resume_parked", SHARD, Uuids([id]), "another token"))
        await waits_for_a_lock(sql, schema)
        await first.commit()
        assert list(await second) == []
    assert entries(sql) == [(id, None, 1, 0)]
    assert sql("SELECT key FROM checkpoints WHERE kind = 'history'") == [("$history/token/step#a1",)]


async def test_a_step_that_parks_while_it_is_resumed_is_resumed_or_stays_parked_but_is_not_woken_in_vain(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, client: Client, app: App
) -> None:
    """Parked after the operator's first look, before the second: it must not wake to find that it is parked."""
    id = await asleep(database, writer, me, None)
    assert await do(database, ("resume_imported", [SHARD, [id]])) == []
    assert waits(sql) == [(id, "operator", 1)]
    other = client.session().database
    assert isinstance(other, FaultyDatabase)
    too_early = other.hold_request("resume_ended")
    (run,) = await held(database, me)
    resuming_it = asyncio.ensure_future(client.handle(run.id).resume())
    await too_early.happened.wait()
    looked = other.hold_answer("resume_parked")
    too_early.leave.set()
    await looked.happened.wait()
    writer.record(run, parked_attempt())
    falls_asleep(writer, run, None)
    await writer.drained()
    looked.leave.set()
    await resuming_it
    assert [row[0] for row in entries(sql)] == [run.id]
    assert sql("SELECT kind FROM checkpoints WHERE workflow_id = %s AND key LIKE '%%step#a1'", run.id) == [("history",)]


# --- suspensions in doubt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_outcome", [False, True], ids=["alone", "with an outcome"])
@pytest.mark.parametrize("woken", [False, True], ids=["asleep", "woken"])
async def test_a_suspension_whose_answer_was_lost_is_over_here_and_is_written_once(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, with_outcome: bool, woken: bool
) -> None:
    (run,) = await held(database, me)
    lost, resent = database.lose_answer("settle"), database.hold_request("settle")
    if with_outcome:
        writer.record(run, outcome("step"))
    falls_asleep(writer, run, 0.0)
    await lost.happened.wait()
    await resent.happened.wait()
    if woken:
        await do(database, waking())
    resent.leave.set()
    await writer.drained()
    assert run.is_suspended or run.loss is not None
    assert not run.is_awoken
    assert run.durable == int(with_outcome)
    expected = ([(run.id, None, 1, 0)], []) if woken else ([], [(run.id, "timer", 1)])
    assert (entries(sql), waits(sql)) == expected


async def test_a_suspension_in_doubt_whose_workflow_this_very_worker_runs_again_leaves_that_run_alone(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    run, other = await held(database, me, 2)
    lost, resent = database.lose_answer("settle"), database.hold_request("settle")
    writer.record(other, outcome("step"))
    falls_asleep(writer, run, 0.0)
    await lost.happened.wait()
    await resent.happened.wait()
    await do(database, waking())
    assert len(await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 1, None, "1")) == 1
    resent.leave.set()
    await writer.drained()
    assert (run.is_suspended, run.is_awoken) == (True, False)
    assert other.durable == 1
    assert (run.id, me, 2, 0) in entries(sql)


@pytest.mark.parametrize("with_outcome", [False, True], ids=["alone", "with an outcome"])
async def test_a_refusal_whose_answer_was_lost_is_a_refusal(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, with_outcome: bool
) -> None:
    (run,) = await held(database, me)
    await do(database, cancelling(run.id))
    database.lose_answer("settle")
    if with_outcome:
        writer.record(run, outcome("step"))
    falls_asleep(writer, run)
    await writer.drained()
    assert (run.is_awoken, run.is_suspended, run.loss) == (True, False, None)
    assert run.durable == int(with_outcome)
    assert (entries(sql), waits(sql)) == ([(run.id, me, 1, 1)], [])


async def test_a_lost_suspension_that_arrives_after_something_came_puts_nobody_to_sleep(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    """Lost on its way; the workflow is cancelled; the second is refused; then the first arrives."""
    (run,) = await held(database, me)
    lost, resent = database.lose_request("settle"), database.hold_request("settle")
    falls_asleep(writer, run)
    await lost.happened.wait()
    await resent.happened.wait()
    await do(database, cancelling(run.id))
    resent.leave.set()
    await writer.drained()
    assert run.is_awoken
    (answer,) = await database.arrive()
    assert list(answer.awake) == [run.id]
    assert (entries(sql), waits(sql)) == ([(run.id, me, 1, 1)], [])


async def test_a_lost_suspension_that_arrives_after_the_workflow_runs_again_puts_nobody_to_sleep(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    database.lose_request("settle")
    falls_asleep(writer, run, 0.0)
    await writer.drained()
    assert run.is_suspended
    await do(database, waking())
    await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 1, None, "1")
    (answer,) = await database.arrive()
    assert not answer.held
    assert (entries(sql), waits(sql)) == ([(run.id, me, 2, 0)], [])


# --- at rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(12))
async def test_a_task_that_has_just_been_woken_is_not_at_rest(turns: int) -> None:
    """What it waited for has come, and it goes on in the next turn of the loop: its run must not suspend now."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    was_woken_at_rest: list[bool] = []
    delivery = Delivery(loop, 0, lambda: was_woken_at_rest.append(future.done()), lambda: None)

    async def waits() -> None:
        with delivery.dormant():
            await future

    task = asyncio.ensure_future(waits())
    delivery.adopt(task)
    for _ in range(turns):
        await asyncio.sleep(0)
    future.set_result(None)
    await task
    await a_few_turns()
    assert True not in was_woken_at_rest


async def test_what_ends_after_all_does_not_fall_asleep_as_well(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    """Something outside has woken its code while its suspension waited to be sent: its result counts."""
    blocked, run = await held(database, me, 2)
    async with flush_blocked(database_url, schema, blocked.id) as blocker:
        writer.record(blocked, outcome("step"))
        await waits_for_a_lock(sql, schema)
        falls_asleep(writer, run)
        writer.record(run, outcome("step"))
        writer.complete(run, "success", "1")
        await blocker.rollback()
        await writer.drained()
    assert (run.result, run.is_suspended, run.durable) == (("success", "1"), False, 1)
    assert waits(sql) == []
    assert [row[0] for row in entries(sql)] == [blocked.id]


# --- a worker, and what comes in between ---------------------------------------------------------------------------


async def a_few_turns() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_workflow_that_is_cancelled_while_it_falls_asleep_is_woken(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql
) -> None:
    """Its suspension is about to be sent; the worker sees the request before, and the suspension is refused."""

    @app.workflow
    async def flow() -> None:
        await sleep(HOUR)

    async with app.worker(lease=LONG):
        sending = faulty.hold_request("settle")
        handle = await app.start(flow())
        await sending.happened.wait()
        seeing = faulty.hold_answer("requests")
        await app.handle(handle.id).cancel(reason="enough")
        await seeing.happened.wait()
        seeing.leave.set()
        await a_few_turns()
        sending.leave.set()
        with pytest.raises(WorkflowCancelled, match="enough"):
            await handle.result(timeout=SOON)
    assert (entries(sql), waits(sql)) == ([], [])


async def test_a_workflow_that_is_cancelled_before_its_suspension_was_heard_of_is_woken(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql
) -> None:
    """The suspension is written, its worker doesn't know yet: who cancels finds the wait."""

    @app.workflow
    async def flow() -> None:
        await sleep(HOUR)

    async with app.worker(lease=LONG):
        written = faulty.hold_answer("settle")
        handle = await app.start(flow())
        await written.happened.wait()
        await client.handle(handle.id).cancel()
        written.leave.set()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
    assert (entries(sql), waits(sql)) == ([], [])


async def test_a_deadline_that_passes_while_a_workflow_falls_asleep_ends_it(
    app: App, faulty: FaultyDatabase, sql: Sql, clock: Any
) -> None:
    @app.workflow(timeout=timedelta(minutes=5))
    async def flow() -> None:
        await sleep(HOUR)

    async with app.worker(lease=timedelta(hours=2)):
        sending = faulty.hold_request("settle")
        handle = await app.start(flow())
        await sending.happened.wait()
        seeing = faulty.hold_answer("requests")
        clock.advance(301)
        await seeing.happened.wait()
        seeing.leave.set()
        await a_few_turns()
        sending.leave.set()
        with pytest.raises(TimeoutError):
            await handle.result(timeout=SOON)
    assert sql("SELECT status FROM workflows") == [("error",)]
    assert (entries(sql), waits(sql), sql("SELECT * FROM deadlines")) == ([], [], [])


async def test_a_deadline_that_passes_before_a_suspension_was_heard_of_ends_the_workflow(
    app: App, faulty: FaultyDatabase, sql: Sql, clock: Any, events: Any
) -> None:
    @app.workflow(timeout=timedelta(minutes=5))
    async def flow() -> None:
        await sleep(HOUR)

    async with app.worker(lease=timedelta(hours=2)):
        written = faulty.hold_answer("settle")
        handle = await app.start(flow())
        await written.happened.wait()
        clock.advance(301)
        await until(sql, "SELECT count(*) = 1 FROM checkpoints WHERE key = '$deadline'")
        written.leave.set()
        with pytest.raises(TimeoutError):
            await handle.result(timeout=SOON)
    assert (entries(sql), waits(sql), sql("SELECT * FROM deadlines")) == ([], [], [])


async def test_a_suspension_in_doubt_that_was_woken_meanwhile_is_run_on_by_the_same_worker(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    ran: list[str] = []

    @step
    async def mark(what: str) -> None:
        ran.append(what)

    @app.workflow
    async def flow() -> str:
        await mark("before")
        await sleep(timedelta(seconds=0.5))
        await mark("after")
        return "done"

    async with app._worker(WorkerOptions(lease=LONG, suspends_from=timedelta(0))):
        lost, resent = faulty.lose_answer("settle"), faulty.hold_request("settle")
        handle = await app.start(flow())
        await lost.happened.wait()
        await resent.happened.wait()
        await events.wait_for(telemetry.WorkflowClaimed, lambda event: event.epoch == 2)
        resent.leave.set()
        assert await handle.result(timeout=SOON) == "done"
    assert ran == ["before", "after"]
    assert (entries(sql), waits(sql)) == ([], [])


async def test_a_run_that_suspends_while_its_worker_asks_for_it_is_not_said_to_be_given_up(
    app: App, client: Client, faulty: FaultyDatabase, events: Any
) -> None:
    """The worker looks for the request of a workflow whose suspension is written, but not heard of: no alarm."""

    @app.workflow
    async def flow() -> str:
        await sleep(HOUR)
        return "done"

    async with app.worker(lease=LONG):
        written = faulty.hold_answer("settle")
        handle = await app.start(flow())
        await written.happened.wait()
        looking = faulty.hold_answer("requests")
        app.session().tell(asked=[handle.id])
        await looking.happened.wait()
        looking.leave.set()
        await a_few_turns()
        written.leave.set()
        await events.wait_for(telemetry.WorkflowSuspended)
        assert events.of(telemetry.RunAbandoned) == []
        await handle.terminate()


async def test_what_is_asked_while_the_worker_looks_already_is_looked_for_again(
    app: App, client: Client, faulty: FaultyDatabase
) -> None:
    """The look that is under way is too old to show it; the next heartbeat is far away."""
    gate = Gate()

    @step
    async def work() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await work()

    async with app.worker(lease=timedelta(minutes=10)) as worker:
        handle = await app.start(flow())
        await gate.has(1)
        looking = faulty.hold_answer("requests")
        worker.asked(handle.id)
        await looking.happened.wait()
        assert len(await do(faulty, cancelling(handle.id))) == 1
        worker.asked(handle.id)
        looking.leave.set()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)


async def test_a_cancellation_without_a_hint_is_found_by_the_heartbeat(app: App, sql: Sql) -> None:
    gate = Gate()

    @step
    async def work() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await work()

    async with app.worker(lease=timedelta(seconds=2)):
        handle = await app.start(flow())
        await gate.has(1)
        sql("UPDATE queue_entries SET wakes = wakes + 1")
        sql(
            "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
            "VALUES (1, %s, '$cancel', 'request', 0, 'success', %s, now())",
            handle.id,
            SAID,
        )
        with pytest.raises(WorkflowCancelled, match="enough"):
            await handle.result(timeout=SOON)


async def test_deadlines_of_what_is_neither_here_nor_there_keep_no_timer_from_its_work(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    """A result that somebody deleted by hand: the workflow isn't anywhere, and its deadline comes due."""
    (lost,) = await start(database)
    sql("DELETE FROM queue_entries WHERE workflow_id = %s", lost)
    sql("INSERT INTO deadlines VALUES (1, %s, now() - interval '1 s')", lost)
    sleeper = await asleep(database, writer, me, 0.0)
    timers = Timers(
        database,
        ("flow",),
        bloat=Bloat(database, turns=Turns()),
        turns=Turns(),
        on_woken=lambda queues: None,
        on_asked=lambda ids: None,
        on_notes=lambda: None,
    )
    for _ in range(2):
        async with asyncio.timeout(5):
            await timers.tick()
    assert entries(sql) == [(sleeper, None, 1, 0)]


# --- parked steps --------------------------------------------------------------------------------------------------


class Broken:
    """What a step needs, and an operator repairs."""

    def __init__(self) -> None:
        self.tries = 0
        self.is_repaired = False

    def use(self) -> str:
        self.tries += 1
        if not self.is_repaired:
            raise ValueError("broken")
        return "fine"


async def test_a_step_that_is_resumed_before_its_worker_knows_that_it_is_parked_goes_on(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql
) -> None:
    """The park is written, its answer is on its way; an operator resumes it, and the worker looks too early."""
    machine = Broken()

    @step(retry=PARKING, on_exhausted="park")
    async def work() -> str:
        return machine.use()

    @app.workflow
    async def flow() -> str:
        return await work()

    async with app.worker(lease=LONG):
        writing = faulty.hold_answer("record")
        handle = await app.start(flow())
        await writing.happened.wait()
        machine.is_repaired = True
        seeing = faulty.hold_answer("requests")
        await handle.resume()
        await seeing.happened.wait()
        seeing.leave.set()
        await a_few_turns()
        writing.leave.set()
        assert await handle.result(timeout=SOON) == "fine"
    assert machine.tries == 2


async def test_a_step_that_is_resumed_while_its_workflow_is_being_loaded_goes_on(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    """What was loaded still says that it is parked."""
    machine = Broken()

    @step(retry=PARKING, on_exhausted="park")
    async def work() -> str:
        return machine.use()

    @app.workflow
    async def flow() -> str:
        value, _ = await asyncio.gather(work(), sleep(timedelta(seconds=1.2)))
        return value

    async with app._worker(DOZING):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        loading = faulty.hold_answer("load", with_rows=True)
        await loading.happened.wait()
        machine.is_repaired = True
        await handle.resume()
        loading.leave.set()
        assert await handle.result(timeout=SOON) == "fine"
    assert machine.tries == 2


async def test_a_step_that_is_resumed_before_the_code_has_come_to_it_again_goes_on(
    app: App, sql: Sql, events: Any
) -> None:
    """The worker has loaded that it is parked, and sees the resume while the code is still busy before it."""
    machine, gate = Broken(), Gate()
    is_new = False

    @step(retry=PARKING, on_exhausted="park")
    async def work() -> str:
        return machine.use()

    @step
    async def inserted() -> None:
        await gate.pass_through()

    async def napping() -> None:
        await sleep(timedelta(seconds=1.2))

    @app.workflow
    async def flow() -> str:
        nap = asyncio.create_task(napping())
        if is_new:
            await inserted()
        value = await work()
        await nap
        return value

    async with app._worker(DOZING) as worker:
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        is_new = True  # the code was deployed anew, with one more step
        await gate.has(1)
        machine.is_repaired = True
        assert len(await do(app.session().database, resuming(handle.id))) == 1
        run = worker._executor.runs[handle.id]
        worker.asked(handle.id)
        await asyncio.to_thread(_until, lambda: run.seen == 1)
        gate.open()
        assert await handle.result(timeout=SOON) == "fine"
    assert machine.tries == 2


async def test_a_step_that_is_resumed_while_its_code_waits_to_say_that_it_is_parked_goes_on(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    """It has been loaded as parked, and the code has come to it: it waits for a flush of what came before."""
    machine = Broken()
    is_new = False

    @step(retry=PARKING, on_exhausted="park")
    async def work() -> str:
        return machine.use()

    async def napping() -> None:
        await sleep(timedelta(seconds=1.2))

    @app.workflow
    async def flow() -> str:
        nap = asyncio.create_task(napping())
        if is_new:
            now()
        value = await work()
        await nap
        return value

    async with app._worker(DOZING) as worker:
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        is_new = True
        writing = faulty.hold_answer("record")
        await writing.happened.wait()
        machine.is_repaired = True
        assert len(await do(faulty, resuming(handle.id))) == 1
        run = worker._executor.runs[handle.id]
        worker.asked(handle.id)
        await asyncio.to_thread(_until, lambda: run.seen == 1)
        writing.leave.set()
        assert await handle.result(timeout=SOON) == "fine"
    assert machine.tries == 2


async def test_a_step_that_parks_while_the_worker_looks_for_another_one_stays_parked(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    """The look is older than the park, so it doesn't show it: that is no resume."""
    first, second, parking, beside = Broken(), Broken(), Gate(), Gate()

    @step(retry=PARKING, on_exhausted="park")
    async def one() -> str:
        return first.use()

    @step(retry=PARKING, on_exhausted="park")
    async def two() -> str:
        await parking.pass_through()
        return second.use()

    @step
    async def three() -> str:  # which keeps the workflow in memory
        await beside.pass_through()
        return "fine"

    @app.workflow
    async def flow() -> list[str]:
        return list(await asyncio.gather(one(), two(), three()))

    async with app.worker(lease=LONG) as worker:
        handle = await app.start(flow())
        await parking.has(1)
        await beside.has(1)
        run = worker._executor.runs[handle.id]
        await asyncio.to_thread(_until, lambda: run.waits.of("operator") == ["one"])
        looking = faulty.hold_answer("requests")
        worker.asked(handle.id)
        await looking.happened.wait()
        parking.open()
        await asyncio.to_thread(_until, lambda: run.waits.of("operator") == ["one", "two"])
        looking.leave.set()
        await a_few_turns()
        beside.open()
        await events.wait_for(telemetry.WorkflowSuspended)
        assert (first.tries, second.tries) == (1, 1)
        first.is_repaired = second.is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["fine", "fine", "fine"]


async def test_only_the_parked_step_of_a_workflow_in_memory_is_tried_anew(app: App, sql: Sql, events: Any) -> None:
    machine, gate = Broken(), Gate()
    ran: list[str] = []

    @step(retry=PARKING, on_exhausted="park")
    async def work() -> str:
        return machine.use()

    @step
    async def other() -> None:
        ran.append("other")
        await gate.pass_through()

    @app.workflow
    async def flow() -> str:
        value, _ = await asyncio.gather(work(), other())
        return value

    async with app.worker(lease=LONG):
        handle = await app.start(flow())
        await gate.has(1)
        await until(sql, "SELECT count(*) = 1 FROM checkpoints WHERE kind = 'park'")
        machine.is_repaired = True
        await handle.resume()
        await events.wait_for(telemetry.StepEnded, lambda event: event.key == "work" and event.status == "success")
        gate.open()
        assert await handle.result(timeout=SOON) == "fine"
    assert (ran, machine.tries) == (["other"], 2)
    assert sql("SELECT epoch FROM workflows") == [(1,)]
    assert events.of(telemetry.WorkflowSuspended) == []


async def test_a_step_that_waits_until_its_park_is_written_waits_for_nothing_unknown(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    @step(retry=PARKING, on_exhausted="park")
    async def work() -> None:
        raise ValueError("broken")

    @app.workflow
    async def flow() -> None:
        await work()

    async with app.worker(lease=LONG) as worker:
        writing = faulty.hold_answer("record")
        handle = await app.start(flow())
        await writing.happened.wait()
        await worker._inspection.tick()
        assert events.of(telemetry.AwaitsForeign) == []
        writing.leave.set()
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.terminate()


# --- the database's time -------------------------------------------------------------------------------------------


async def test_the_time_that_workflows_see_does_not_go_back_when_a_heartbeat_is_answered_late(
    app: App, lease_databases: LeaseDatabases
) -> None:
    gate = Gate()

    @step
    async def first() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> float:
        before = now()
        await first()
        return (now() - before).total_seconds()

    async with app.worker(lease=timedelta(seconds=4)) as worker:
        (lease,) = lease_databases.made
        late, next_one = lease.hold_answer("heartbeat"), lease.hold_request("heartbeat")
        thread = worker._lease._own
        assert thread is not None
        handle = await app.start(flow())
        await gate.has(1)
        began = time.monotonic()
        await asyncio.to_thread(_until, late.happened.is_set)
        answered = time.monotonic()
        await asyncio.to_thread(_until, lambda: time.monotonic() - answered > 0.5)
        thread.call_soon_threadsafe(late.leave.set)
        await asyncio.to_thread(_until, next_one.happened.is_set)  # the late one was taken in
        passed = time.monotonic() - began
        gate.open()
        assert await handle.result(timeout=SOON) >= passed
        thread.call_soon_threadsafe(next_one.leave.set)


def _until(condition: Callable[[], bool], timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- all at once ---------------------------------------------------------------------------------------------------


async def test_many_that_suspend_for_moments_while_others_cancel_and_resume_them_all_come_to_their_right_end(
    app: App, client: Client, database_url: str, schema: str, sql: Sql
) -> None:
    """Three clients at random; suspensions from the first moment on; one worker that also loses answers."""
    chance = random.Random(str(time.time_ns()))
    flows: dict[int, Handle[Any]] = {}
    asked: set[UUID] = set()
    undone: set[int] = set()
    broken: dict[int, int] = {}

    @step(retry=PARKING, on_exhausted="park")
    async def fragile(number: int) -> int:
        broken[number] = broken.get(number, 0) + 1
        if broken[number] < 2:
            raise ValueError("broken")
        return number

    @step
    async def plain(number: int) -> int:
        return number

    @step
    async def undo(number: int) -> None:
        undone.add(number)

    @app.workflow
    async def flow(number: int, pauses: list[float]) -> int:
        total = 0
        try:
            for pause in pauses:
                await sleep(timedelta(seconds=pause))
                total += await plain(1)
            await asyncio.gather(sleep(timedelta(seconds=pauses[0])), plain(0))
        except asyncio.CancelledError:
            await sleep(timedelta(milliseconds=2))
            await undo(number)
            raise
        return total

    @app.workflow
    async def parking(number: int) -> int:
        await sleep(timedelta(milliseconds=1))
        _, value = await asyncio.gather(sleep(timedelta(milliseconds=3)), fragile(number))
        return value

    @app.workflow
    async def sleeper(number: int) -> None:
        await sleep(HOUR)

    async def cancels(who: Client, handle: Handle[Any]) -> None:
        await asyncio.sleep(chance.random() * 0.03)
        try:
            await who.handle(handle.id).cancel()
            asked.add(handle.id)
        except WrongState as error:
            if error.status != "success":
                raise

    async def lives(number: int) -> Any:
        pauses = [chance.choice((0.0, 0.001, 0.01)) for _ in range(chance.randint(1, 3))]
        handle = flows[number] = await app.start(flow(number, pauses))
        if chance.random() < 0.6:
            await asyncio.gather(*(cancels(who, handle) for who in chance.choices((client, third), k=2)))
        return await asyncio.gather(handle.result(), return_exceptions=True)

    async def sleeps(number: int) -> Any:
        handle = await app.start(sleeper(number))
        await cancels(chance.choice((client, third)), handle)
        return await asyncio.gather(handle.result(), return_exceptions=True)

    async def resumes(who: Client, handles: list[Handle[Any]]) -> None:
        left = list(handles)
        while left:
            for handle in list(left):
                try:
                    await who.handle(handle.id).resume()
                except WrongState as error:
                    if error.status not in ("success",):
                        continue
                left.remove(handle)
            await asyncio.sleep(0.01)

    options = WorkerOptions(lease=LONG, suspends_from=timedelta(0), concurrency=30)
    async with Client(database_url, schema=schema) as third, app._worker(options):
        parked = [await app.start(parking(number)) for number in range(20)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(resumes(third, parked))
            group.create_task(resumes(client, parked[::-1]))
            asleep = [group.create_task(sleeps(number)) for number in range(40)]
            outcomes = await asyncio.gather(*(lives(number) for number in range(60)))
            values = await asyncio.gather(*(each.result() for each in parked))
    assert {type(ending) for task in asleep for ending in task.result()} == {WorkflowCancelled}
    assert values == list(range(20))
    assert set(broken.values()) == {2}, "each was tried once, and once more when it was resumed"
    began = {id for (id,) in sql("SELECT id FROM workflows WHERE started_at IS NOT NULL")}
    for number, (found,) in enumerate(outcomes):
        if isinstance(found, BaseException):
            assert isinstance(found, WorkflowCancelled), repr(found)
            assert flows[number].id in asked
            assert (number in undone) == (flows[number].id in began)
        else:
            assert number not in undone
    assert (entries(sql), waits(sql)) == ([], [])
    assert sql("SELECT DISTINCT status FROM workflows WHERE name = 'parking'") == [("success",)]

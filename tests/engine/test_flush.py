"""PROTOCOLS §§2-4: the flush, its fence, and what becomes of it in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from perdure import telemetry
from perdure.engine.writer import _PATIENCE_SECONDS, Writer
from perdure.model.records import Suspension
from perdure.store.arrays import BigInts, Uuids
from perdure.store.statements import SHARD

from .support import (
    FakeRun,
    FaultyDatabase,
    Sql,
    flush_blocked,
    locked,
    outcome,
    register,
    start,
    until,
    waits_for_a_lock,
)

Checkpoints = Callable[[UUID], list[tuple[Any, ...]]]


async def held(database: FaultyDatabase, me: UUID, count: int) -> list[FakeRun]:
    return [FakeRun(id, me) for id in await start(database, count, worker_id=me)]


async def taken_over(database: FaultyDatabase, sql: Sql, run: FakeRun) -> FakeRun:
    """Another worker holds that workflow now, at a higher epoch."""
    other = await register(database)
    sql("UPDATE queue_entries SET worker_id = %s, epoch = epoch + 1 WHERE workflow_id = %s", other, run.id)
    return FakeRun(run.id, other, run.epoch + 1)


# --- patience ------------------------------------------------------------------------------------------------------


async def test_outcomes_that_can_wait_make_few_flushes(
    database: FaultyDatabase, writer: Writer, me: UUID, events: Any
) -> None:
    (run,) = await held(database, me, 1)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(500):
        writer.record(run, outcome(f"child#{number}", position=number), is_patient=True)
        await asyncio.sleep(0)
    while run.durable < 500:
        await run.told()
    elapsed = loop.time() - began
    assert 1 <= len(events.of(telemetry.FlushBegins)) <= 1 + elapsed / _PATIENCE_SECONDS


@pytest.mark.parametrize("what", ["another outcome", "another run", "the end", "a suspension", "somebody who waits"])
async def test_outcomes_that_can_wait_go_with_the_first_that_cannot(
    database: FaultyDatabase, writer: Writer, me: UUID, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("perdure.engine.writer._PATIENCE_SECONDS", 3600.0)
    run, other = await held(database, me, 2)
    writer.record(run, outcome("child"), is_patient=True)
    for _ in range(10):
        await asyncio.sleep(0)  # the writer waits by now
    writer.record(run, outcome("another child", position=2), is_patient=True)
    match what:
        case "another outcome":
            writer.record(run, outcome("step", position=3))
        case "another run":
            writer.record(other, outcome("step"))
        case "the end":
            writer.complete(run, "success", "1")
        case "a suspension":
            writer.suspend(run, Suspension("timer", 3600.0, 0))
        case _:
            writer.hurry()
    while run.durable < 2:
        await asyncio.wait_for(run.told(), 20)


# --- the fence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
async def test_a_flush_for_a_run_that_another_worker_has_taken_writes_nothing_of_it_and_the_rest(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints, ends: bool
) -> None:
    runs = await held(database, me, 5)
    heir = await taken_over(database, sql, runs[2])
    for run in runs:
        writer.record(run, outcome("step"))
        if ends:
            writer.complete(run, "success", '"done"')
    await writer.drained()
    for run in runs:
        if run is runs[2]:
            assert run.loss is not None
            assert (run.durable, run.result, checkpoints(run.id)) == (0, None, [])
        else:
            assert (run.loss, run.durable) == (None, 1)
            assert [key for key, *_ in checkpoints(run.id)] == (["step", "$result"] if ends else ["step"])
    assert sql("SELECT worker_id, epoch FROM queue_entries WHERE workflow_id = %s", heir.id) == [(heir.worker_id, 2)]


@pytest.mark.parametrize("ends", [False, True])
async def test_a_flush_for_a_run_that_this_very_worker_has_claimed_again_writes_nothing_of_it(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints, ends: bool
) -> None:
    runs = await held(database, me, 3)
    sql("UPDATE queue_entries SET epoch = 2 WHERE workflow_id = %s", runs[1].id)  # released, and claimed by us
    for run in runs:
        writer.record(run, outcome("step"))
        if ends:
            writer.complete(run, "success", "1")
    await writer.drained()
    assert runs[1].loss is not None
    assert checkpoints(runs[1].id) == []
    assert [run.durable for run in runs] == [1, 0, 1]
    assert sql("SELECT epoch FROM queue_entries WHERE workflow_id = %s", runs[1].id) == [(2,)]


async def test_a_flush_where_one_goes_on_and_another_that_ends_is_lost_records_the_one(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    going, ending = await held(database, me, 2)
    await taken_over(database, sql, ending)
    writer.record(going, outcome("step"))
    writer.complete(ending, "success", "1")
    await writer.drained()
    assert (going.durable, going.loss) == (1, None)
    assert ending.loss is not None
    assert checkpoints(ending.id) == []


async def test_a_flush_for_an_entry_that_is_gone_is_lost(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    run, neighbour = await held(database, me, 2)
    sql("DELETE FROM queue_entries WHERE workflow_id = %s", run.id)  # an operator ended it
    writer.record(run, outcome("step"))
    writer.complete(run, "success", "1")
    writer.record(neighbour, outcome("step"))
    await writer.drained()
    assert run.loss is not None
    assert checkpoints(run.id) == []
    assert neighbour.durable == 1


async def test_a_claim_under_way_makes_the_flush_wait_and_then_find_nothing(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    checkpoints: Checkpoints,
) -> None:
    (run,) = await held(database, me, 1)
    other = await register(database)
    taking = "UPDATE queue_entries SET worker_id = %s, epoch = epoch + 1 WHERE workflow_id = %s"
    async with locked(database_url, schema, taking, other, run.id) as claim:
        writer.record(run, outcome("step"))
        await waits_for_a_lock(sql, schema)
        assert run.loss is None
        await claim.commit()
        await run.told()
    assert run.loss is not None
    assert checkpoints(run.id) == []


async def test_a_flush_under_way_makes_a_recovery_pass_by_and_come_again(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    """The flush has locked the entry and waits to insert; the recovery skips it, and finds it at its next look."""
    (run,) = await held(database, me, 1)
    async with flush_blocked(database_url, schema, run.id) as blocker:
        writer.record(run, outcome("step"))
        await waits_for_a_lock(sql, schema)
        assert list(await database.attempt("recover", SHARD, me, 100)) == []
        await blocker.rollback()
        await run.told()
    assert run.durable == 1
    assert [row.workflow_id for row in await database.attempt("recover", SHARD, me, 100)] == [run.id]
    # It had recorded something: no stall.
    assert sql("SELECT recoveries, stalls FROM queue_entries") == [(1, 0)]
    writer.record(run, outcome("step#2"))
    await run.told()
    assert run.loss is not None


async def test_a_release_waits_for_the_flush_that_is_under_way(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    checkpoints: Checkpoints,
) -> None:
    (run,) = await held(database, me, 1)
    async with flush_blocked(database_url, schema, run.id) as blocker:
        writer.record(run, outcome("step"))
        await waits_for_a_lock(sql, schema)
        releasing = asyncio.ensure_future(database.attempt("release", SHARD, me, Uuids([run.id]), BigInts([1]), 0))
        await waits_for_a_lock(sql, schema, 2)
        assert not releasing.done()
        await blocker.rollback()
        assert len(await releasing) == 1
    assert len(checkpoints(run.id)) == 1


# --- all or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
async def test_a_checkpoint_that_is_there_already_costs_only_its_own_workflow(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints, ends: bool
) -> None:
    runs = await held(database, me, 9)
    hostile = runs[4]
    sql(
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
        "VALUES (1, %s, 'second', 'step', 1, 'success', '\"hostile\"', now())",
        hostile.id,
    )
    before = checkpoints(hostile.id)
    for run in runs:
        writer.record(run, outcome("first"))
        writer.record(run, outcome("second", position=2))
        if ends:
            writer.complete(run, "success", "1")
    await writer.drained()
    assert hostile.loss is not None
    assert (hostile.durable, hostile.result, hostile.refusal) == (0, None, None)
    assert checkpoints(hostile.id) == before, "all of it is written, or nothing"
    for run in runs:
        if run is not hostile:
            assert (run.durable, run.loss, run.result is not None) == (2, None, ends)


@pytest.mark.parametrize(
    "payload", ["no json", '"\x00"', '"\ud800"', "{" * 200_000], ids=["no json", "NUL", "lone surrogate", "too deep"]
)
async def test_one_bad_row_among_five_hundred_costs_only_its_own_caller(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, events: Any, payload: str
) -> None:
    runs = await held(database, me, 500)
    for number, run in enumerate(runs):
        writer.record(run, outcome("step", payload if number == 321 else "1"))
    async with asyncio.timeout(60):
        await asyncio.gather(*(run.told() for run in runs))
    assert [number for number, run in enumerate(runs) if run.refusal is not None] == [321]
    assert [number for number, run in enumerate(runs) if run.durable != 1] == [321]
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'step'") == [(499,)]
    assert [event.workflow_id for event in events.of(telemetry.CheckpointRefused)] == [runs[321].id]


async def test_outcomes_gather_while_a_flush_is_in_flight_and_go_in_the_next_one(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    runs = await held(database, me, 20)
    async with flush_blocked(database_url, schema, runs[0].id) as blocker:
        writer.record(runs[0], outcome("step"))
        await waits_for_a_lock(sql, schema)
        for run in runs[1:]:
            writer.record(run, outcome("step"))
        writer.record(runs[0], outcome("step#2", position=2))
        writer.complete(runs[0], "success", "1")
        assert writer.backlog == 20
        await blocker.rollback()
        await writer.drained()
    flushes = [(event.workflows, event.checkpoints, event.ended) for event in events.of(telemetry.FlushCommitted)]
    assert flushes == [(1, 1, 0), (20, 20, 1)]


async def test_what_is_discarded_while_it_gathers_is_not_written(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    schema: str,
    database_url: str,
    checkpoints: Checkpoints,
) -> None:
    first, second = await held(database, me, 2)
    async with flush_blocked(database_url, schema, first.id) as blocker:
        writer.record(first, outcome("step"))
        await waits_for_a_lock(sql, schema)
        writer.record(second, outcome("step"))
        writer.discard(second)
        await blocker.rollback()
        await writer.drained()
    assert first.durable == 1
    assert (second.durable, checkpoints(second.id)) == (0, [])


async def test_runs_of_two_worker_ids_never_share_a_flush(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    """After a lost lease the new id's outcomes may gather behind what is left of the old one's."""
    (old,) = await held(database, me, 1)
    again = await register(database)
    (new,) = await held(database, again, 1)
    (blocked,) = await held(database, me, 1)
    async with flush_blocked(database_url, schema, blocked.id) as blocker:
        writer.record(blocked, outcome("step"))
        await waits_for_a_lock(sql, schema)
        writer.record(old, outcome("step"))
        writer.record(new, outcome("step"))
        await blocker.rollback()
        await writer.drained()
    assert [event.workflows for event in events.of(telemetry.FlushCommitted)] == [1, 1, 1]
    assert (old.durable, new.durable) == (1, 1)


# --- in doubt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_flush_whose_answer_was_lost_recognises_its_own(
    database: FaultyDatabase,
    writer: Writer,
    me: UUID,
    sql: Sql,
    events: Any,
    checkpoints: Checkpoints,
    ends: bool,
    times: int,
) -> None:
    runs = await held(database, me, 3)
    database.lose_answer("complete" if ends else "record", times=1)
    database.lose_answer("recorded", times=times - 1)
    for run in runs:
        writer.record(run, outcome("step"))
    if ends:
        writer.complete(runs[0], "success", '"mine"')
    await writer.drained()
    assert [(run.durable, run.loss, run.refusal) for run in runs] == [(1, None, None)] * 3
    assert runs[0].result == (("success", '"mine"') if ends else None)
    assert events.of(telemetry.FlushInDoubt)
    for run in runs:
        assert [key for key, *_ in checkpoints(run.id)].count("step") == 1


@pytest.mark.parametrize("ends", [False, True])
async def test_a_flush_whose_request_was_lost_is_written_by_the_second_and_the_first_comes_to_nothing(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints, ends: bool
) -> None:
    runs = await held(database, me, 3)
    database.lose_request("complete" if ends else "record")
    for run in runs:
        writer.record(run, outcome("step"))
    if ends:
        writer.complete(runs[0], "success", "1")
    await writer.drained()
    assert [(run.durable, run.loss) for run in runs] == [(1, None)] * 3
    before = [checkpoints(run.id) for run in runs]
    entries = sql("SELECT * FROM queue_entries ORDER BY workflow_id")
    if ends:
        (answer,) = await database.arrive()
        assert not answer.held
    else:
        with pytest.raises(psycopg.errors.UniqueViolation):
            await database.arrive()
    assert [checkpoints(run.id) for run in runs] == before
    assert sql("SELECT * FROM queue_entries ORDER BY workflow_id") == entries


async def test_a_lost_flush_that_arrives_after_somebody_else_has_taken_over_writes_nothing(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    """Sent, lost on the way; taken over and recorded by another; the resend is told, the first one arrives last."""
    run, neighbour = await held(database, me, 2)
    losing = database.lose_request("record")
    resent = database.hold_request("record")
    writer.record(run, outcome("step", '"ours"'))
    writer.record(neighbour, outcome("step", '"ours"'))
    await losing.happened.wait()
    await resent.happened.wait()
    heir = await taken_over(database, sql, run)
    writer_of_heir = Writer(database, "1")
    task = asyncio.create_task(writer_of_heir.run())
    writer_of_heir.record(heir, outcome("step", '"theirs"'))
    await heir.told()
    resent.leave.set()
    await run.told()
    await neighbour.told()
    (answer,) = await database.arrive()
    task.cancel()
    assert not answer.held
    assert run.loss is not None
    assert heir.durable == neighbour.durable == 1
    assert checkpoints(run.id) == [("step", heir.worker_id, 2, '"theirs"')]
    assert checkpoints(neighbour.id) == [("step", me, 1, '"ours"')]


async def test_a_flush_that_took_effect_before_somebody_took_over_is_acknowledged(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    """Decided by (worker id, epoch) of what is stored: it is durable, whoever holds the entry by now."""
    (run,) = await held(database, me, 1)
    lost = database.lose_answer("record")
    resent = database.hold_request("record")
    writer.record(run, outcome("step"))
    await lost.happened.wait()
    await resent.happened.wait()
    await taken_over(database, sql, run)
    resent.leave.set()
    await run.told()
    assert (run.durable, run.loss) == (1, None)
    assert checkpoints(run.id) == [("step", me, 1, "1")]


async def test_the_same_content_by_somebody_else_is_not_taken_for_ours(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    (run,) = await held(database, me, 1)
    lost = database.lose_request("complete")
    resent = database.hold_request("complete")
    writer.record(run, outcome("step"))
    writer.complete(run, "success", "1")
    await lost.happened.wait()
    await resent.happened.wait()
    heir = await taken_over(database, sql, run)
    others = Writer(database, "1")
    task = asyncio.create_task(others.run())
    others.record(heir, outcome("step"))
    others.complete(heir, "success", "1")
    await heir.told()
    resent.leave.set()
    await run.told()
    task.cancel()
    assert (run.durable, run.result) == (0, None)
    assert run.loss is not None
    assert [row[1:3] for row in checkpoints(run.id)] == [(heir.worker_id, 2)] * 2


async def test_a_flush_in_doubt_with_a_bad_row_in_it_is_halved_and_each_half_asks(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    runs = await held(database, me, 8)
    database.lose_request("record")  # in doubt from here on
    for number, run in enumerate(runs):
        writer.record(run, outcome("step", "no json" if number == 5 else "1"))
    await writer.drained()
    assert [number for number, run in enumerate(runs) if run.refusal] == [5]
    assert [run.durable for run in runs] == [1, 1, 1, 1, 1, 0, 1, 1]
    assert [run.loss for run in runs] == [None] * 8


async def test_a_half_whose_answer_is_lost_recognises_its_own(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, checkpoints: Checkpoints
) -> None:
    runs = await held(database, me, 4)
    attempts = 0
    real = database.attempt

    async def attempt(name: str, /, *params: object) -> Any:
        nonlocal attempts
        if name == "record":
            attempts += 1
            if attempts == 2:
                database.lose_answer("record")  # the first half: it takes effect, and nobody is told
        return await real(name, *params)

    database.attempt = attempt  # type: ignore[method-assign]
    for number, run in enumerate(runs):
        writer.record(run, outcome("step", "no json" if number == 3 else "1"))
    await writer.drained()
    assert attempts > 2
    assert [run.durable for run in runs] == [1, 1, 1, 0]
    assert [run.loss for run in runs] == [None] * 4
    assert runs[3].refusal is not None


async def test_a_flush_is_sent_again_with_the_same_rows_and_nothing_added(
    database: FaultyDatabase, writer: Writer, me: UUID, events: Any
) -> None:
    runs = await held(database, me, 2)
    lost = database.lose_request("record")
    resent = database.hold_request("record")
    writer.record(runs[0], outcome("step"))
    await lost.happened.wait()
    writer.record(runs[0], outcome("step#2", position=2))
    writer.record(runs[1], outcome("step"))
    await resent.happened.wait()
    resent.leave.set()
    await writer.drained()
    flushes = [(event.workflows, event.checkpoints) for event in events.of(telemetry.FlushCommitted)]
    assert flushes == [(1, 1), (2, 2)]
    assert [run.durable for run in runs] == [2, 1]


# --- it waits for nobody -------------------------------------------------------------------------------------------


async def test_a_flush_does_not_wait_for_a_start_that_waits_for_a_key(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, schema: str, database_url: str
) -> None:
    (run,) = await held(database, me, 1)
    holding = (
        "INSERT INTO workflow_rows (shard, id, name, key, queue, created_at) "
        "VALUES (1, gen_random_uuid(), 'flow', 'taken', 'q', now())"
    )
    async with locked(database_url, schema, holding):
        writer.record(run, outcome("step"))
        writer.complete(run, "success", "1")
        await run.told()
    assert run.result == ("success", "1")
    assert await until(sql, "SELECT count(*) = 0 FROM queue_entries")


@pytest.mark.parametrize("how", ["ends", "suspends"])
async def test_a_flush_locks_its_entries_in_one_order(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, database_url: str, schema: str, how: str
) -> None:
    """Else whoever tells several workflows, in the order of their ids, and a flush may wait for each other."""
    first, goes_on = sorted(await held(database, me, 2), key=lambda run: run.id)
    entry = "SELECT FROM queue_entries WHERE workflow_id = %s FOR UPDATE"
    async with locked(database_url, schema, entry, first.id) as somebody:
        writer.record(goes_on, outcome("step"))
        if how == "ends":
            writer.complete(first, "success", "1")
        else:
            writer.suspend(first, Suspension("timer", None, 0))  # type: ignore[arg-type]
        await waits_for_a_lock(sql, schema)
        await somebody.execute(f"{entry} NOWAIT", (goes_on.id,))
    await writer.drained()
    assert goes_on.durable == 1

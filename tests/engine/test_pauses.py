"""Timers that are put off again and again (the pauses between polls): one row each, and never early."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from perdure import telemetry
from perdure.engine.writer import Writer
from perdure.model.records import Suspension

from .support import FakeRun, FaultyDatabase, Sql, outcome, start

HOUR = 3600.0
KEY = "poll#t"


async def held(database: FaultyDatabase, me: UUID, count: int = 1) -> list[FakeRun]:
    return [FakeRun(id, me) for id in await start(database, count, worker_id=me)]


def take(sql: Sql, run: FakeRun) -> None:
    """Somebody else has it now."""
    sql("UPDATE queue_entries SET worker_id = gen_random_uuid(), epoch = epoch + 1 WHERE workflow_id = %s", run.id)


def timers(sql: Sql, run: FakeRun) -> list[tuple[str, int]]:
    """The timers of a workflow, each with the minutes that are left of it."""
    query = "SELECT key, round(date_part('epoch', wake_at - now()) / 60)::int4 FROM checkpoints"
    return sql(f"{query} WHERE kind = 'timer' AND workflow_id = %s ORDER BY key", run.id)


async def test_a_timer_that_is_put_off_again_stays_one_row(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    for hours in (1, 2, 3):
        writer.put_off(run, KEY, hours * HOUR, 0)
        await writer.drained()
    assert timers(sql, run) == [(KEY, 180)]
    assert run.loss is None


async def test_of_a_timer_that_is_put_off_twice_in_one_flush_the_latest_counts(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    writer.put_off(run, KEY, HOUR, 0)
    writer.put_off(run, "other#t", HOUR, 0)
    writer.put_off(run, KEY, 2 * HOUR, 0)
    await writer.drained()
    assert timers(sql, run) == [("other#t", 60), (KEY, 120)]


async def test_a_timer_travels_with_outcomes_ends_and_suspensions_of_other_runs(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, events: Any
) -> None:
    polling, going, ending, leaving = await held(database, me, 4)
    writer.put_off(polling, KEY, HOUR, 0)
    writer.record(going, outcome("step"))
    writer.complete(ending, "success", "1")
    writer.suspend(leaving, Suspension("timer", time.monotonic() + HOUR, 0))
    await writer.drained()
    assert len(events.of(telemetry.FlushCommitted)) == 1
    assert timers(sql, polling) == [(KEY, 60)]
    assert (going.durable, ending.result, leaving.is_suspended) == (1, ("success", "1"), True)


async def test_a_timer_is_written_with_the_suspension_that_waits_for_it(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    writer.put_off(run, KEY, HOUR, 0)
    writer.suspend(run, Suspension("retry", time.monotonic() + HOUR, 0))
    await writer.drained()
    assert timers(sql, run) == [(KEY, 60)]
    assert sql("SELECT waiting_for FROM waits WHERE workflow_id = %s", run.id) == [("retry",)]


async def test_a_timer_of_a_run_that_somebody_else_has_is_not_put_off(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    run, neighbour = await held(database, me, 2)
    writer.put_off(run, KEY, HOUR, 0)
    await writer.drained()
    take(sql, run)
    writer.put_off(run, KEY, 5 * HOUR, 0)
    writer.put_off(neighbour, KEY, HOUR, 0)
    await writer.drained()
    assert run.loss is not None
    assert timers(sql, run) == [(KEY, 60)]
    assert timers(sql, neighbour) == [(KEY, 60)]


async def test_a_flush_whose_answer_was_lost_puts_a_timer_off_once(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql, events: Any
) -> None:
    (run,) = await held(database, me)
    database.lose_answer("settle")
    writer.put_off(run, KEY, HOUR, 0)
    writer.record(run, outcome("step"))
    await writer.drained()
    assert events.of(telemetry.FlushInDoubt)
    assert (run.durable, run.loss) == (1, None)
    assert timers(sql, run) == [(KEY, 60)]


async def test_a_flush_that_arrives_late_does_not_make_a_timer_early(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    database.lose_request("settle")
    writer.put_off(run, KEY, 60.0, 0)
    await writer.drained()
    writer.put_off(run, KEY, 5 * HOUR, 0)
    await writer.drained()
    (answer,) = await database.arrive()
    assert answer.held
    assert timers(sql, run) == [(KEY, 300)]


async def test_a_timer_that_was_put_off_before_does_not_tell_that_a_lost_flush_was_committed(
    database: FaultyDatabase, writer: Writer, me: UUID, sql: Sql
) -> None:
    (run,) = await held(database, me)
    writer.put_off(run, KEY, HOUR, 0)
    await writer.drained()
    lost = database.lose_request("settle")
    resent = database.hold_request("settle")
    writer.put_off(run, KEY, HOUR, 0)
    writer.record(run, outcome("step"))
    await lost.happened.wait()
    await resent.happened.wait()
    take(sql, run)
    resent.leave.set()
    await writer.drained()
    assert (run.durable, run.loss is not None) == (0, True)

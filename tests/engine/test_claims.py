"""PROTOCOLS §7: claims, and what keeps the database and the process of one mind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from perdure import App, Client, Invocation, step, telemetry
from perdure.store.arrays import Texts
from perdure.store.statements import SHARD

from .support import (
    FaultyDatabase,
    Gate,
    Sql,
    flush_blocked,
    locked,
    register,
    start,
    start_claimed_at_birth,
    until,
    waits_for_a_lock,
)

LEASE = timedelta(seconds=1)
LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)

Checkpoints = Callable[[UUID], list[tuple[Any, ...]]]


async def test_claims_at_the_same_time_take_no_more_than_their_limit_and_nothing_twice(
    database: FaultyDatabase, me: UUID, sql: Sql
) -> None:
    await start(database, 100)
    workers = [await register(database) for _ in range(8)]

    async def claim(worker: UUID) -> list[UUID]:
        taken: list[UUID] = []
        for _ in range(2):
            rows = await database.attempt("claim", SHARD, worker, "q", Texts(["flow"]), 5, None, "1")
            assert len(rows) <= 5
            taken += [row.workflow_id for row in rows]
        return taken

    taken = await asyncio.gather(*(claim(worker) for worker in workers))
    ids = [id for some in taken for id in some]
    assert len(ids) == len(set(ids))
    assert sql("SELECT count(*) FROM queue_entries WHERE worker_id IS NOT NULL") == [(len(ids),)]
    assert sql("SELECT max(epoch) FROM queue_entries") == [(1,)]


async def test_a_claim_takes_by_priority_then_by_age(database: FaultyDatabase, me: UUID, sql: Sql) -> None:
    ids = await start(database, 6)
    sql("UPDATE queue_entries SET priority = 1 WHERE workflow_id = ANY(%s)", [ids[4], ids[2]])
    rows = await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 4, None, "1")
    assert {row.workflow_id for row in rows} == {ids[2], ids[4], ids[0], ids[1]}


async def test_a_claim_passes_by_what_somebody_has_locked(
    database: FaultyDatabase, me: UUID, schema: str, database_url: str
) -> None:
    ids = await start(database, 3)
    locking = "SELECT FROM queue_entries WHERE workflow_id = %s FOR UPDATE"
    async with locked(database_url, schema, locking, ids[0]):
        rows = await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 2, None, "1")
    assert {row.workflow_id for row in rows} == {ids[1], ids[2]}


async def test_a_worker_runs_no_more_than_its_concurrency(app: App, client: Client) -> None:
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    pending = await client.start_many([Invocation("flow") for _ in range(12)])
    async with app.worker(concurrency=3, lease=LONG):
        await gate.has(3)
        own = await app.start_many([flow() for _ in range(12)])
        gate.open()
        await asyncio.gather(*(app.handle(handle.id).result(timeout=SOON) for handle in pending + own))
    assert gate.most == 3


async def test_a_start_does_not_take_the_slot_that_a_claim_under_way_will_need(
    app: App, client: Client, faulty: FaultyDatabase, events: Any
) -> None:
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    async with app.worker(concurrency=1, lease=LONG):
        first = await app.start(flow())  # the worker knows the queue from now on
        await gate.has(1)
        gate.open()
        await first.result(timeout=SOON)
        gate.close()
        claiming = faulty.hold_answer("claim", with_rows=True)
        claimed = await client.start(Invocation("flow"))
        async with asyncio.timeout(10):
            await claiming.happened.wait()  # its only slot is spoken for
        own = await app.start(flow())
        claiming.leave.set()
        await gate.has(2)
        await events.wait_for(telemetry.WorkflowClaimed, lambda event: event.workflow_id == claimed.id)
        gate.open()
        await own.result(timeout=SOON)
        await app.handle(claimed.id).result(timeout=SOON)
    assert gate.most == 1


async def test_a_claim_whose_answer_was_lost_is_reconciled_and_nothing_runs_twice(
    app: App, client: Client, faulty: FaultyDatabase, events: Any, sql: Sql
) -> None:
    ran: list[int] = []

    @step
    async def work(number: int) -> int:
        ran.append(number)
        return number

    @app.workflow
    async def flow(number: int) -> int:
        return await work(number)

    handles = await client.start_many([Invocation("flow", number) for number in range(5)])
    faulty.lose_answer("claim", with_rows=True)
    async with app.worker(lease=LONG):
        results = [await app.handle(handle.id).result(timeout=SOON) for handle in handles]
        reconciled = await events.wait_for(telemetry.Reconciled)
    assert results == [0, 1, 2, 3, 4]
    assert sorted(ran) == [0, 1, 2, 3, 4]
    assert (reconciled.released, reconciled.dropped) == (5, 0)
    assert sql("SELECT DISTINCT epoch, recoveries FROM workflows") == [(2, 0)]


async def test_a_history_whose_loading_failed_leaves_nothing_behind(
    app: App, client: Client, faulty: FaultyDatabase, sql: Sql
) -> None:
    """The claim took effect, the second statement didn't answer."""

    @app.workflow
    async def flow() -> str:
        return "done"

    handle = await client.start(Invocation("flow"))
    sql("UPDATE queue_entries SET epoch = 1")  # it ran before
    faulty.lose_request("load")
    async with app.worker(lease=LONG):
        assert await app.handle(handle.id).result(timeout=SOON) == "done"
    assert sql("SELECT epoch, recoveries FROM workflows") == [(3, 0)]


async def test_a_run_that_the_database_gave_to_somebody_else_is_dropped(
    app: App, sql: Sql, database: FaultyDatabase, events: Any
) -> None:
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    other = await register(database, lease=600)
    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await gate.has(1)
        sql("UPDATE queue_entries SET worker_id = %s, epoch = epoch + 1", other)
        reconciled = await events.wait_for(telemetry.Reconciled)
        assert (reconciled.released, reconciled.dropped) == (0, 1)
        assert [event.workflow_id for event in events.of(telemetry.RunAbandoned)] == [handle.id]
    assert gate.left == [None], "its body was ended"
    assert sql("SELECT worker_id, epoch FROM queue_entries") == [(other, 2)]


async def test_a_claim_that_failed_is_tried_again_without_asking_where_something_is_pending(
    app: App, client: Client, faulty: FaultyDatabase, events: Any
) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker(lease=LONG):
        await (await client.start(Invocation("flow"))).result(timeout=SOON)
        failed = faulty.lose_request("claim")
        handle = await client.start(Invocation("flow"))
        async with asyncio.timeout(10):
            await failed.happened.wait()
        faulty.sent.clear()
        assert await handle.result(timeout=SOON) == "done"
    sent = [name for name in faulty.sent if name in ("claim", "pending_queues")]
    assert sent[0] == "claim"


async def test_an_entry_that_nobody_here_runs_is_released(app: App, client: Client, sql: Sql, events: Any) -> None:
    @app.workflow
    async def flow() -> None: ...

    lost = await client.start(Invocation("flow"), queue="another")
    async with app.worker(lease=LEASE, queues=["default"]) as worker:
        sql("UPDATE queue_entries SET worker_id = %s, epoch = 1", worker.worker_id)
        await events.wait_for(telemetry.Reconciled, lambda event: event.released == 1)
        await until(sql, "SELECT worker_id IS NULL FROM queue_entries")
    assert sql("SELECT workflow_id, epoch, recoveries, stalls FROM queue_entries") == [(lost.id, 1, 0, 0)]


async def test_what_is_being_started_here_is_not_taken_for_lost(
    app: App, faulty: FaultyDatabase, events: Any, sql: Sql
) -> None:
    """The start is committed, its answer is on its way, and the heartbeat counts one more than we run."""

    @app.workflow
    async def flow(number: int) -> int:
        return number

    async with app.worker(lease=LEASE) as worker:
        await app.run(flow(0))
        number, starting, answer = await start_claimed_at_birth(app, faulty, sql, worker.worker_id)
        beats = sql("SELECT heartbeat_at FROM worker_rows")[0][0]
        for _ in range(3):
            beats = await until(sql, "SELECT heartbeat_at FROM worker_rows WHERE heartbeat_at > %s", beats)
        assert sql("SELECT worker_id, epoch FROM queue_entries") == [(worker.worker_id, 1)]
        answer.leave.set()
        assert await (await starting).result(timeout=SOON) == number
    assert events.of(telemetry.Reconciled) == []


async def test_a_claim_of_what_still_runs_here_ends_the_old_run_and_drops_what_it_had_queued(
    app: App, sql: Sql, schema: str, database_url: str, checkpoints: Checkpoints, events: Any
) -> None:
    gate = Gate()
    bodies: list[str] = []

    @step
    async def first(name: str) -> str:
        bodies.append(name)
        return f"{name} {len(bodies)}"

    @step
    async def second() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow(name: str) -> str:
        value = await first(name)
        await second()
        return value

    @app.workflow
    async def neighbour() -> None:
        await first("neighbour")

    async with app.worker(lease=LONG):
        await app.run(neighbour())  # the queue is known
        bodies.clear()
        blocker = await app.start(neighbour(), delay=timedelta(hours=1))
        async with flush_blocked(database_url, schema, blocker.id, "first") as transaction:
            # The neighbour's flush waits for that transaction, and what `flow` records gathers behind it.
            sql("UPDATE waits SET wake_at = now()")
            await waits_for_a_lock(sql, schema)
            handle = await app.start(flow("flow"))
            await until(sql, "SELECT count(*) = 1 FROM queue_entries WHERE name = 'flow' AND worker_id IS NOT NULL")
            await events.wait_for(
                telemetry.StepEnded, lambda event: (event.workflow_id, event.key) == (handle.id, "first")
            )
            sql("UPDATE queue_entries SET worker_id = NULL WHERE workflow_id = %s", handle.id)
            await events.wait_for(telemetry.RunAbandoned, lambda event: event.workflow_id == handle.id)
            await events.wait_for(
                telemetry.StepEnded,
                lambda event: event.workflow_id == handle.id and bodies.count("flow") == 2 and event.key == "first",
            )
            await transaction.rollback()
        gate.open()
        value = await handle.result(timeout=SOON)
    assert bodies.count("flow") == 2
    assert gate.came == [None], "the old run began nothing more"
    (row,) = [row for row in checkpoints(handle.id) if row[0] == "first"]
    assert (row[2], row[3]) == (2, f'"{value}"'), "what the new run has recorded is what the code got"


async def test_a_claim_that_the_server_has_lost_is_not_taken_for_the_one_that_follows(
    app: App, sql: Sql, events: Any
) -> None:
    gate = Gate()

    @step
    async def work() -> int:
        await gate.pass_through()
        return len(gate.came)

    @app.workflow
    async def flow() -> int:
        return await work()

    async with app.worker(lease=LONG) as worker:
        handle = await app.start(flow())
        await gate.has(1)
        sql("UPDATE queue_entries SET worker_id = NULL, epoch = epoch - 1")
        worker.hint("default")
        await gate.has(2)
        gate.open()
        assert await handle.result(timeout=SOON) == 2
    claimed = [event.epoch for event in events.of(telemetry.WorkflowClaimed)]
    assert claimed == [1, 2], "with the same epoch, what the former run has under way would count as the later one's"


async def test_a_flush_under_way_of_a_run_that_is_gone_does_not_count_as_one_of_the_next_claim(
    app: App, sql: Sql, faulty: FaultyDatabase, events: Any
) -> None:
    """A failover has lost the claim; reconciliation finds that before the same worker gets the same epoch again."""
    gate = Gate()

    @step
    async def first() -> int:
        await gate.pass_through()
        return len(gate.came)

    @step
    async def second(number: int) -> int:
        return number

    @app.workflow
    async def flow() -> int:
        return await second(await first())

    async with app.worker(lease=LONG) as worker:
        flush = faulty.hold_request("record")
        handle = await app.start(flow())
        await gate.has(1)
        gate.open()
        async with asyncio.timeout(20):
            await flush.happened.wait()
        gate.close()
        faulty.lose_request("claim")
        sql("UPDATE queue_entries SET worker_id = NULL, epoch = epoch - 1")
        worker.hint("default")
        gone = await events.wait_for(telemetry.RunAbandoned)
        await gate.has(2)
        flush.leave.set()
        gate.open()
        assert await handle.result(timeout=SOON) == 2
    assert gone.reason == "the database says that this worker doesn't hold it"
    assert [event.epoch for event in events.of(telemetry.WorkflowClaimed)] == [1, 2]
    assert sql("SELECT DISTINCT epoch FROM checkpoints WHERE kind <> 'input'") == [(2,)]


@pytest.mark.parametrize("born_claimed", [False, True], ids=["from the queue", "at birth"])
async def test_a_claim_that_comes_back_after_the_lease_was_lost_runs_nothing_under_the_old_id(
    app: App,
    client: Client,
    faulty: FaultyDatabase,
    clock: Any,
    sql: Sql,
    schema: str,
    database_url: str,
    events: Any,
    born_claimed: bool,
) -> None:
    gate = Gate()

    @step
    async def work(number: int) -> int:
        if number:
            await gate.pass_through(number)
        return number

    @app.workflow
    async def flow(number: int) -> int:
        return await work(number)

    async with app.worker(lease=timedelta(seconds=4)) as worker:
        old = worker.worker_id
        await app.run(flow(0))
        if born_claimed:
            gate.open()
            number, starting, claiming = await start_claimed_at_birth(app, faulty, sql, old)
            gate.close()
            gate.came.clear()
        else:
            number, claiming = 1, faulty.hold_answer("claim", with_rows=True)
            starting = asyncio.ensure_future(client.start(Invocation("flow", number)))
            async with asyncio.timeout(10):
                await claiming.happened.wait()
        # The lease runs out; that it says goodbye to its old id, and registers a new one, is held up meanwhile.
        locking = "SELECT FROM worker_rows WHERE id = %s FOR UPDATE"
        async with locked(database_url, schema, locking, old) as transaction:
            clock.advance(60)
            await events.wait_for(telemetry.LeaseLost)
            await waits_for_a_lock(sql, schema)
            claiming.leave.set()
            handle = await starting
            held = "SELECT worker_id = %s FROM queue_entries WHERE workflow_id = %s"
            assert sql(held, old, handle.id) == [(True,)]
            await transaction.rollback()
        await until(sql, "SELECT worker_id <> %s FROM queue_entries WHERE workflow_id = %s", old, handle.id)
        await gate.has(1)
        gate.open()
        assert await app.handle(handle.id).result(timeout=SOON) == number
    assert gate.came == [number], "the body ran under an id that was dead"

"""PROTOCOLS §8: leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from perdure import App, step, telemetry
from perdure.config import Settings
from perdure.engine.bloat import Bloat
from perdure.engine.leases import Body, Lease, Registration
from perdure.engine.loop import Turns
from perdure.engine.recovery import Recovery
from perdure.store.arrays import Texts
from perdure.store.statements import SHARD

from .support import FaultyDatabase, Gate, LeaseDatabases, Sql, locked, register, start, until

LEASE = timedelta(seconds=1)
SOON = timedelta(seconds=20)


class Keeper:
    """A lease without a worker around it: notes what it is told."""

    def __init__(self, settings: Settings, lease: timedelta = LEASE) -> None:
        self.frozen_for = 0.0
        self.told: list[tuple[str, UUID]] = []
        registration = Registration(app="app", version="1", names=("flow",), queues=None, concurrency=10, lease=lease)
        self.lease = Lease(
            settings,
            registration,
            on_held=lambda id: self.told.append(("held", id)),
            on_lost=lambda id, reason: self.told.append(("lost", id)),
            on_beat=lambda held, wakes: None,
            known=lambda: None,
            long_bodies=self._bodies,
            monotonic=lambda: time.monotonic() + self.frozen_for,
        )

    def _bodies(self, seconds: float) -> Sequence[Body]:
        return ()


@pytest.fixture
async def keeper(
    database: FaultyDatabase, database_url: str, schema: str, lease_databases: LeaseDatabases
) -> AsyncIterator[Keeper]:
    keeper = Keeper(Settings(database_url=database_url, schema=schema))
    await keeper.lease.start()
    yield keeper
    await keeper.lease.end()


async def test_a_lost_lease_gives_a_new_id_after_the_runs_have_ended(keeper: Keeper, clock: Any, sql: Sql) -> None:
    first = keeper.lease.worker_id
    clock.advance(5)
    async with asyncio.timeout(10):
        while len(keeper.told) < 3:
            await asyncio.sleep(0.005)
    (held, lost, again) = keeper.told
    assert (held, lost) == (("held", first), ("lost", first))
    assert again == ("held", keeper.lease.worker_id)
    assert keeper.lease.worker_id != first
    assert sql("SELECT status FROM worker_rows ORDER BY started_at") == [("dead",), ("live",)]


async def test_a_lease_that_the_database_says_is_over_is_not_valid_until_there_is_a_new_one(
    keeper: Keeper, clock: Any, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    first = keeper.lease.worker_id
    async with locked(database_url, schema, "SELECT FROM worker_rows WHERE id = %s FOR UPDATE", first) as transaction:
        clock.advance(5)
        await events.wait_for(telemetry.LeaseLost)
        assert not keeper.lease.is_valid
        await transaction.rollback()
    await until(sql, "SELECT count(*) = 1 FROM workers WHERE status = 'live'")


async def test_a_process_that_was_frozen_for_longer_than_the_lease_believes_it_no_more(
    keeper: Keeper, sql: Sql
) -> None:
    """Whether or not the database has noticed: here it hasn't, and would accept its beats."""
    first = keeper.lease.worker_id
    assert keeper.lease.is_valid
    keeper.frozen_for = 5.0
    assert not keeper.lease.is_valid
    async with asyncio.timeout(10):
        while len(keeper.told) < 3:
            await asyncio.sleep(0.005)
    assert [what for what, _ in keeper.told] == ["held", "lost", "held"]
    assert keeper.lease.worker_id != first
    assert sql("SELECT status FROM worker_rows WHERE id = %s", first) == [("dead",)]


async def test_a_beat_whose_answer_was_lost_costs_nothing(
    keeper: Keeper, lease_databases: LeaseDatabases, sql: Sql
) -> None:
    first = keeper.lease.worker_id
    for plan in (lease_databases.made[0].lose_answer("heartbeat"), lease_databases.made[0].lose_request("heartbeat")):
        await asyncio.to_thread(lambda plan=plan: _wait(lambda: plan.left == 0))
    beats = sql("SELECT heartbeat_at FROM worker_rows")[0][0]
    await until(sql, "SELECT heartbeat_at > %s FROM worker_rows", beats)
    assert keeper.told == [("held", first)]


async def test_a_worker_whose_beats_are_lost_ends_its_runs_no_later_than_the_database_lets_others_take_them(
    keeper: Keeper, lease_databases: LeaseDatabases, sql: Sql
) -> None:
    first = keeper.lease.worker_id
    lease_databases.made[0].lose_request("heartbeat", times=1000)
    async with asyncio.timeout(10):
        while ("lost", first) not in keeper.told:
            ((over,),) = sql("SELECT expires_at <= now() FROM worker_rows WHERE id = %s", first)
            assert not (over and keeper.lease.is_valid and keeper.lease.worker_id == first)
            await asyncio.sleep(0.005)


async def test_a_lease_whose_registration_was_sent_twice_is_not_believed_for_longer_than_it_holds(
    database: FaultyDatabase, database_url: str, schema: str, lease_databases: LeaseDatabases, sql: Sql
) -> None:
    """The first one counts, on the side of the database: so it must here."""

    lease_databases.plans = [
        lambda its: its.lose_answer("register_worker"),
        lambda its: its.lose_request("heartbeat", times=1000),
    ]
    keeper = Keeper(Settings(database_url=database_url, schema=schema))
    await keeper.lease.start()
    first = keeper.lease.worker_id
    try:
        async with asyncio.timeout(10):
            while ("lost", first) not in keeper.told:
                ((over,),) = sql("SELECT expires_at <= now() FROM worker_rows WHERE id = %s", first)
                assert not (over and keeper.lease.is_valid and keeper.lease.worker_id == first)
                await asyncio.sleep(0.002)
    finally:
        await keeper.lease.end()


def _wait(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_a_worker_that_lost_its_lease_ends_its_runs_and_goes_on_under_a_new_id(
    app: App, clock: Any, sql: Sql, events: Any
) -> None:
    gate = Gate()

    @step
    async def inside() -> str:
        if not gate.came:
            await gate.pass_through()
        return "through"

    @app.workflow
    async def flow() -> str:
        return await inside()

    async with app.worker(lease=timedelta(seconds=4)) as worker:
        first = worker.worker_id
        handle = await app.start(flow())
        await gate.has(1)
        clock.advance(60)
        await events.wait_for(telemetry.RunAbandoned, lambda event: event.workflow_id == handle.id)
        assert await handle.result(timeout=SOON) == "through"
        assert worker.worker_id != first
    assert gate.left == [None], "the body under the old id was ended"
    assert sql("SELECT worker_id = %s, recoveries FROM workflows", first) == [(False, 1)]
    assert sql("SELECT count(*) FROM checkpoints WHERE worker_id = %s", first) == [(0,)]


# --- who may bury whom ---------------------------------------------------------------------------------------------


def recovery_of(database: FaultyDatabase, me: UUID) -> Recovery:
    lease: Any = SimpleNamespace(is_valid=True, worker_id=me)
    return Recovery(
        database,
        lease,
        interval=1.0,
        bloat=Bloat(database, turns=Turns()),
        turns=Turns(),
        on_recovered=lambda queues: None,
    )


@pytest.fixture
async def ticking(database: FaultyDatabase, clock: Any) -> Any:
    return clock


async def beat(database: FaultyDatabase, id: UUID) -> bool:
    return bool(await database.attempt("heartbeat", SHARD, id, None))


async def test_after_an_outage_nobody_is_declared_dead_for_one_lease(
    database: FaultyDatabase, ticking: Any, sql: Sql
) -> None:
    first = await register(database, lease=10)
    second = await register(database, lease=10)
    (held,) = await start(database, worker_id=second)
    ticking.advance(30)  # both were cut off
    assert not await beat(database, first)
    first = await register(database, lease=10)  # it is back first, under a new id
    await recovery_of(database, first).tick()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("live",)]
    assert sql("SELECT worker_id FROM queue_entries WHERE workflow_id = %s", held) == [(second,)]
    for _ in range(3):
        ticking.advance(3)
        assert await beat(database, first)
    await recovery_of(database, first).tick()
    assert sql("SELECT worker_id FROM queue_entries WHERE workflow_id = %s", held) == [(second,)]
    ticking.advance(3)
    assert not await beat(database, second)
    assert await beat(database, first)
    await recovery_of(database, first).tick()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("dead",)]
    assert sql("SELECT worker_id, recoveries FROM queue_entries WHERE workflow_id = %s", held) == [(None, 1)]


async def test_after_an_outage_that_is_shorter_than_the_lease_nobody_is_declared_dead_either(
    database: FaultyDatabase, ticking: Any, sql: Sql
) -> None:
    """It ends the lease of who beat first before it, and not yet that of who beat last."""
    first, second = await register(database, lease=10), await register(database, lease=10)
    ticking.advance(4)
    for _ in range(5):
        ticking.advance(2)
        assert await beat(database, second)
        assert await beat(database, first)
    ticking.advance(2)
    assert await beat(database, first)
    ticking.advance(9)  # an outage: 11 s since the second one's beat, 9 s since the first one's
    await recovery_of(database, first).tick()
    assert await beat(database, first)
    await recovery_of(database, first).tick()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("live",)]
    for _ in range(4):
        ticking.advance(2)
        assert await beat(database, first)
        await recovery_of(database, first).tick()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("live",)]
    ticking.advance(2.5)
    assert await beat(database, first)
    await recovery_of(database, first).tick()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("dead",)]


async def test_a_worker_whose_own_lease_is_over_buries_nobody(database: FaultyDatabase, ticking: Any, sql: Sql) -> None:
    first, second = await register(database, lease=10), await register(database, lease=30)
    ticking.advance(40)
    await recovery_of(database, second).tick()
    assert sql("SELECT DISTINCT status FROM worker_rows WHERE id = ANY(%s)", [first, second]) == [("live",)]


async def test_a_worker_that_beats_at_that_moment_is_not_buried(
    database: FaultyDatabase, ticking: Any, sql: Sql, schema: str, database_url: str
) -> None:
    """The beat was sent in time, holds its row, and commits while somebody looks for the dead."""
    first, second = await register(database, lease=10), await register(database, lease=1)
    beating = "UPDATE worker_rows SET expires_at = now() + interval '10 s' WHERE id = %s AND expires_at > now()"
    async with locked(database_url, schema, beating, second) as transaction:
        ticking.advance(11)
        await database.attempt("end_worker", SHARD, first, "dead")
        third = await register(database, lease=1)
        ticking.advance(0)
        sql("UPDATE worker_rows SET held_since = held_since - interval '1 h' WHERE id = %s", third)
        async with asyncio.timeout(5):
            await recovery_of(database, third).tick()
        await transaction.commit()
    assert sql("SELECT status FROM worker_rows WHERE id = %s", second) == [("live",)]


async def test_a_clock_that_is_set_back_keeps_nobody_alive_who_is_dead(
    database: FaultyDatabase, ticking: Any, sql: Sql
) -> None:
    """Who is alive has written a new lease, once the longer of two leases has passed; who hasn't is dead."""
    first, dead, patient = [await register(database, lease=seconds) for seconds in (10, 10, 40)]
    (held,) = await start(database, worker_id=dead)
    ticking.advance(-86_400)
    seen: list[list[tuple[str]]] = []
    for _ in range(9):
        assert await beat(database, first)
        await recovery_of(database, first).tick()
        seen.append(sql("SELECT status FROM worker_rows WHERE id IN (%s, %s) ORDER BY id <> %s", dead, patient, dead))
        ticking.advance(2.5)
        assert await beat(database, first)
        ticking.advance(2.5)
        if len(seen) == 5:
            assert await beat(database, patient)
    assert seen == [[("live",), ("live",)]] * 2 + [[("dead",), ("live",)]] * 7
    assert sql("SELECT worker_id, recoveries FROM queue_entries WHERE workflow_id = %s", held) == [(None, 1)]


async def test_a_dead_worker_stays_dead(database: FaultyDatabase, ticking: Any, sql: Sql) -> None:
    id = await register(database, lease=10)
    await database.attempt("end_worker", SHARD, id, "dead")
    assert not await beat(database, id)
    await register(database, lease=10, id=id)
    assert not await beat(database, id)
    assert sql("SELECT status FROM worker_rows WHERE id = %s", id) == [("dead",)]


async def test_where_many_workers_live_each_looks_half_as_often(database: FaultyDatabase, sql: Sql) -> None:
    me, *_ = [await register(database) for _ in range(9)]
    recovery = recovery_of(database, me)
    await recovery.tick()
    assert recovery.pause == 1.0
    await register(database)
    await recovery.tick()
    assert recovery.pause == 2.0
    sql("UPDATE worker_rows SET held_since = held_since - interval '1 h' WHERE id = %s", me)
    sql("UPDATE worker_rows SET expires_at = now() - interval '1 s' WHERE id <> %s", me)
    await recovery.tick()
    assert recovery.pause == 1.0, "the only one that is left looks as often as it can, at once"


# --- recovery ------------------------------------------------------------------------------------------------------


async def test_recovery_goes_in_batches_passes_by_what_is_locked_and_finds_it_at_its_next_look(
    database: FaultyDatabase, me: UUID, sql: Sql, schema: str, database_url: str, events: Any
) -> None:
    dead = await register(database)
    ids = await start(database, 3, worker_id=dead)
    sql(
        "INSERT INTO queue_entries (shard, workflow_id, queue, name, enqueued_at, worker_id, epoch) "
        "SELECT 1, gen_random_uuid(), 'q', 'flow', now(), %s, 1 FROM generate_series(1, 1200)",
        dead,
    )
    await database.attempt("end_worker", SHARD, dead, "dead")
    recovery = recovery_of(database, me)
    async with locked(database_url, schema, "SELECT FROM queue_entries WHERE workflow_id = ANY(%s) FOR SHARE", ids):
        await recovery.tick()
        counts = [event.count for event in events.of(telemetry.WorkflowsRecovered)]
        assert counts == [500, 500, 200]
        left = sql("SELECT workflow_id FROM queue_entries WHERE worker_id IS NOT NULL ORDER BY workflow_id")
        assert left == [(id,) for id in sorted(ids)]
    await recovery.tick()
    assert sql("SELECT count(*), min(recoveries), max(recoveries) FROM queue_entries") == [(1203, 1, 1)]
    assert sql("SELECT count(*) FROM queue_entries WHERE worker_id IS NOT NULL") == [(0,)]


async def test_many_who_recover_at_the_same_time_recover_each_workflow_once(
    database: FaultyDatabase, me: UUID, sql: Sql
) -> None:
    dead = await register(database)
    await start(database, 60, worker_id=dead)
    await database.attempt("end_worker", SHARD, dead, "dead")
    recoverers = [await register(database) for _ in range(6)]
    await asyncio.gather(*(recovery_of(database, one).tick() for one in recoverers))
    await recovery_of(database, me).tick()
    assert sql("SELECT recoveries, stalls, epoch, count(*) FROM queue_entries GROUP BY 1, 2, 3") == [(1, 1, 1, 60)]


async def test_what_is_recovered_keeps_its_place(database: FaultyDatabase, me: UUID, sql: Sql) -> None:
    dead = await register(database)
    old = await start(database, 3, worker_id=dead)
    await start(database, 3)
    places = sql("SELECT workflow_id, enqueued_at FROM queue_entries ORDER BY workflow_id")
    await database.attempt("end_worker", SHARD, dead, "dead")
    await recovery_of(database, me).tick()
    assert sql("SELECT workflow_id, enqueued_at FROM queue_entries ORDER BY workflow_id") == places
    rows = await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 3, None, "1")
    assert {row.workflow_id for row in rows} == set(old)
    assert {row.epoch for row in rows} == {2}, "the epoch goes on"


async def test_a_claim_that_commits_after_its_worker_was_buried_is_recovered(
    database: FaultyDatabase, me: UUID, sql: Sql
) -> None:
    dead = await register(database)
    (pending,) = await start(database)
    await database.attempt("end_worker", SHARD, dead, "dead")
    recovery = recovery_of(database, me)
    await recovery.tick()
    await database.attempt("claim", SHARD, dead, "q", Texts(["flow"]), 1, None, "1")  # it was on its way
    await recovery.tick()
    assert sql("SELECT workflow_id, worker_id, epoch FROM queue_entries") == [(pending, None, 1)]


async def test_a_worker_without_a_valid_lease_recovers_nobody(database: FaultyDatabase, me: UUID, sql: Sql) -> None:
    dead = await register(database)
    await start(database, worker_id=dead)
    await database.attempt("end_worker", SHARD, dead, "dead")
    lease: Any = SimpleNamespace(is_valid=False, worker_id=me)
    await Recovery(
        database,
        lease,
        interval=1.0,
        bloat=Bloat(database, turns=Turns()),
        turns=Turns(),
        on_recovered=lambda queues: None,
    ).tick()
    assert sql("SELECT worker_id FROM queue_entries") == [(dead,)]


async def test_a_life_in_which_something_was_recorded_is_no_stall(database: FaultyDatabase, me: UUID, sql: Sql) -> None:
    dead = await register(database)
    busy, idle = await start(database, 2, worker_id=dead)
    sql("UPDATE queue_entries SET stalls = 5")
    sql(
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at, worker_id, epoch) "
        "VALUES (1, %s, 'step', 'step', 1, 'success', now(), %s, 1)",
        busy,
        dead,
    )
    await database.attempt("end_worker", SHARD, dead, "dead")
    await recovery_of(database, me).tick()
    rows = sql("SELECT workflow_id, recoveries, stalls FROM queue_entries ORDER BY workflow_id")
    assert rows == sorted([(busy, 1, 0), (idle, 1, 6)])

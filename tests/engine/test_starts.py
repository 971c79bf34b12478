"""PROTOCOLS §6: starts, alone and in batches, in doubt, and claimed at birth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from perdure import App, Client, Invocation, KeyConflict, SerializationError, step
from perdure.config import Settings
from perdure.model.ids import new_id
from perdure.model.records import Claim
from perdure.starter import Starter
from perdure.store.programs import NewWorkflow, Started

from .support import FaultyDatabase, Gate, Sql, locked, until, waits_for_a_lock

LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)


def new(key: str | None = None, input: str = "{}", **options: Any) -> NewWorkflow:
    return NewWorkflow(id=new_id(key), name="flow", queue="q", input=input, key=key, **options)


@pytest.fixture
async def starter(database: FaultyDatabase, database_url: str, schema: str) -> AsyncIterator[Starter]:
    settings = Settings(database_url=database_url, schema=schema, connect_timeout=timedelta(seconds=15))
    starter = Starter(database, settings, on_started=lambda queues: None, on_timer=lambda: None)
    yield starter
    await starter.close()


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
@pytest.mark.parametrize("input", ["no json", '"\x00"', '"\ud800"'], ids=["no json", "NUL", "lone surrogate"])
async def test_one_bad_row_among_five_hundred_starts_costs_only_its_own_caller(
    starter: Starter, sql: Sql, keyed: bool, input: str
) -> None:
    news = [new(f"key {number}" if keyed else None, input if number == 123 else "{}") for number in range(500)]
    outcomes = await asyncio.gather(*(starter.start([one]) for one in news), return_exceptions=True)
    assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)] == [123]
    assert isinstance(outcomes[123], SerializationError)
    assert sql("SELECT count(*) FROM workflows") == [(499,)]


@pytest.mark.parametrize(("count", "statements"), [(100, 1), (500, 2)])
async def test_starts_at_the_same_time_go_in_one_statement_and_a_crowd_in_two(
    starter: Starter, database: FaultyDatabase, count: int, statements: int
) -> None:
    await starter.start([new()])
    database.sent.clear()
    await asyncio.gather(*(starter.start([new()]) for _ in range(count)))
    assert database.sent.count("start") == statements


async def test_what_is_started_in_one_call_goes_in_one_statement(starter: Starter, database: FaultyDatabase) -> None:
    database.sent.clear()
    news = [new() for _ in range(700)]
    outcomes = await asyncio.gather(starter.start(news[:500]), starter.start(news[500:]), starter.start([]))
    assert [len(each) for each in outcomes] == [500, 200, 0]
    assert database.sent.count("start") == 2


async def test_of_a_crowd_two_batches_are_under_way(starter: Starter, database: FaultyDatabase, sql: Sql) -> None:
    held = database.hold_answer("start")
    starting = asyncio.create_task(starter.start([new() for _ in range(3500)]))
    await held.happened.wait()
    await until(sql, "SELECT count(*) >= 2000 FROM workflow_rows")
    assert not starting.done()
    held.leave.set()
    assert all(one.started for one in await starting)
    await starter.start([new()])
    assert sql("SELECT count(*) FROM workflow_rows") == [(3501,)]


async def test_a_start_whose_request_was_lost_and_arrives_late_starts_nothing_twice(
    starter: Starter, database: FaultyDatabase, sql: Sql
) -> None:
    news = [new(), new()]
    database.lose_request("start")
    started = await starter.start(news)
    assert started == [Started(id=one.id, started=True) for one in news]
    before = sql("SELECT * FROM queue_entries ORDER BY workflow_id")
    with pytest.raises(psycopg.errors.UniqueViolation):
        await database.arrive()
    assert sql("SELECT * FROM queue_entries ORDER BY workflow_id") == before


async def test_a_start_whose_answer_was_lost_is_acknowledged_though_it_runs_already(
    starter: Starter, database: FaultyDatabase, sql: Sql
) -> None:
    lost = database.lose_answer("start")
    asking = database.hold_request("started")
    one = new()
    starting = asyncio.ensure_future(starter.start([one]))
    async with asyncio.timeout(10):
        await lost.happened.wait()
        await asking.happened.wait()
    sql("DELETE FROM queue_entries")  # somebody has claimed and ended it meanwhile
    asking.leave.set()
    assert await starting == [Started(id=one.id, started=True)]
    assert sql("SELECT count(*) FROM queue_entries") == [(0,)]


class Slots:
    """A worker in this process, whose lease ends while a start of its own is under way."""

    def __init__(self) -> None:
        self.taken: set[UUID] = set()
        self.doubted: list[UUID] = []
        self.ids: list[UUID | None] = [uuid4()]

    @property
    def worker_id(self) -> UUID | None:
        return self.ids.pop() if self.ids else None

    def reserve(self, queue: str, name: str, id: UUID) -> bool:
        self.taken.add(id)
        return True

    def launch(self, claims: Sequence[Claim]) -> None:
        assert not claims

    def forget(self, ids: Sequence[UUID], *, in_doubt: bool) -> None:
        self.taken.difference_update(ids)
        self.doubted += ids if in_doubt else []


@pytest.mark.parametrize("lose", ["lose_request", "lose_answer"])
async def test_a_slot_taken_for_a_start_is_free_again_where_the_lease_ends_in_the_middle_of_it(
    starter: Starter, database: FaultyDatabase, lose: str
) -> None:
    slots = starter.local = Slots()
    getattr(database, lose)("start")
    one = new()
    assert await starter.start([one]) == [Started(id=one.id, started=True)]
    assert slots.taken == set()
    assert slots.doubted == [one.id]  # the first worker id may hold it


async def test_the_slots_of_starts_that_fail_unexpectedly_are_free_again(starter: Starter) -> None:
    slots = starter.local = Slots()
    one = new()
    outcomes = await asyncio.gather(starter.start([one]), starter.start([one]), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [psycopg.errors.UniqueViolation] * 2
    assert slots.taken == set()


async def test_a_start_in_doubt_with_a_bad_row_in_it_costs_only_its_own_caller(
    starter: Starter, database: FaultyDatabase, sql: Sql
) -> None:
    database.lose_request("start")
    news = [new(input="no json" if number == 2 else "{}") for number in range(5)]
    outcomes = await asyncio.gather(*(starter.start([one]) for one in news), return_exceptions=True)
    assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)] == [2]
    assert sql("SELECT count(*) FROM workflows") == [(4,)]


async def test_who_waits_for_a_key_that_somebody_leaves_open_waits_alone(
    starter: Starter, sql: Sql, schema: str, database_url: str
) -> None:
    holding = (
        "INSERT INTO workflow_rows (shard, id, name, key, queue, created_at) "
        "VALUES (1, gen_random_uuid(), 'flow', 'held', 'q', now())"
    )
    async with locked(database_url, schema, holding) as transaction:
        held = asyncio.ensure_future(starter.start([new("held")]))
        await waits_for_a_lock(sql, schema)
        async with asyncio.timeout(10):
            plain = await starter.start([new()])
            others = await asyncio.gather(*(starter.start([new(f"key {number}")]) for number in range(20)))
        assert all(started.started for (started,) in [plain, *others])
        assert not held.done()
        await transaction.rollback()
        async with asyncio.timeout(10):
            ((started,),) = [await held]
    assert started.started


async def test_one_key_started_by_many_at_the_same_time_is_one_workflow(
    database: FaultyDatabase, database_url: str, schema: str, sql: Sql
) -> None:
    settings = Settings(database_url=database_url, schema=schema)
    starters = [Starter(database, settings, on_started=lambda queues: None, on_timer=lambda: None) for _ in range(6)]
    outcomes = await asyncio.gather(*(one.start([new("key")]) for one in starters for _ in range(5)))
    assert len({started.id for (started,) in outcomes}) == 1
    assert sum(started.started for (started,) in outcomes) == 1
    assert sql("SELECT count(*), min(key) FROM workflows") == [(1, "key")]
    for one in starters:
        await one.close()


async def test_a_conflict_is_told_as_data_and_the_others_of_the_batch_start(starter: Starter, sql: Sql) -> None:
    (first,) = await starter.start([new("taken")])
    news = [new("taken", on_conflict="raise"), new("taken"), new("free")]
    outcomes = await asyncio.gather(*(starter.start([one]) for one in news), return_exceptions=True)
    assert isinstance(outcomes[0], KeyConflict)
    assert outcomes[0].workflow_id == first.id
    assert outcomes[1:] == [[Started(id=first.id, started=False)], [Started(id=news[2].id, started=True)]]


@pytest.mark.parametrize("loss", ["request", "answer"])
async def test_a_start_claimed_at_birth_in_doubt_runs_once(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any, loss: str
) -> None:
    bodies: list[int] = []

    @step
    async def work(number: int) -> int:
        bodies.append(number)
        return number

    @app.workflow
    async def flow(number: int) -> int:
        return await work(number)

    async with app.worker(lease=LONG):
        await app.run(flow(0))
        if loss == "request":
            faulty.lose_request("start")
        else:
            faulty.lose_answer("start")
        handles = await app.start_many([flow(number) for number in range(1, 4)])
        assert [await handle.result(timeout=SOON) for handle in handles] == [1, 2, 3]
    assert sorted(bodies) == [0, 1, 2, 3]
    assert sql("SELECT count(*) FROM queue_entries") == [(0,)]
    assert sql("SELECT max(recoveries) FROM workflows") == [(0,)]


async def test_a_start_claimed_at_birth_whose_lost_request_arrives_late_is_released(
    app: App, faulty: FaultyDatabase, sql: Sql, events: Any
) -> None:
    """The caller gave up; the request arrives after that, with an entry of ours that nobody here knows of."""

    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker(lease=timedelta(seconds=1)):
        await app.run(flow())
        faulty.lose_request("start")
        starting = asyncio.ensure_future(app.start(flow()))
        async with asyncio.timeout(10):
            while not faulty.late:
                await asyncio.sleep(0.005)
            handle = await starting
        await handle.result(timeout=SOON)
        sql("DELETE FROM checkpoints WHERE workflow_id = %s", handle.id)  # as if the second had not been sent
        sql("DELETE FROM workflow_rows WHERE id = %s", handle.id)
        await faulty.arrive()
        assert await handle.result(timeout=SOON) == "done"


async def test_nothing_that_waits_is_overtaken_by_a_start_of_this_process(app: App, client: Client, sql: Sql) -> None:
    gate = Gate()
    order: list[int] = []

    @step
    async def work(number: int) -> None:
        order.append(number)
        if number == 0:
            await gate.pass_through()

    @app.workflow
    async def flow(number: int) -> None:
        await work(number)

    async with app.worker(lease=LONG, concurrency=1):
        handles = [await client.start(Invocation("flow", 0))]
        await gate.has(1)
        handles += [await client.start(Invocation("flow", number)) for number in range(1, 6)]
        handles += [await app.start(flow(number)) for number in range(6, 9)]
        assert sql("SELECT count(*) FROM queue_entries WHERE worker_id IS NOT NULL") == [(1,)]
        gate.open()
        await asyncio.gather(*(app.handle(handle.id).result(timeout=SOON) for handle in handles))
    assert order == list(range(9))


async def test_a_start_into_a_paused_queue_is_not_run_at_birth(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker(lease=LONG):
        await app.run(flow())
        sql("UPDATE queue_rows SET paused = true")
        handle = await app.start(flow())
        assert sql("SELECT worker_id, epoch FROM queue_entries") == [(None, 0)]
        sql("UPDATE queue_rows SET paused = false")
        assert await handle.result(timeout=SOON) == "done"


async def test_a_delayed_start_waits_for_the_clock_of_the_database(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker(lease=timedelta(hours=4)):
        handle = await app.start(flow(), delay=timedelta(hours=1))
        assert sql("SELECT status FROM workflows") == [("waiting",)]
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == "done"
    assert sql("SELECT count(*) FROM waits") == [(0,)]


async def test_many_who_wake_the_same_sleepers_wake_each_once(
    database: FaultyDatabase, starter: Starter, sql: Sql
) -> None:
    await starter.start([new(delay=3600.0) for _ in range(100)])
    sql("UPDATE waits SET wake_at = now()")
    await asyncio.gather(*(database.attempt("wake_due", 1, 30, None) for _ in range(6)))
    while sql("SELECT count(*) FROM waits") != [(0,)]:
        await database.attempt("wake_due", 1, 30, None)
    assert sql("SELECT count(*), count(DISTINCT workflow_id) FROM queue_entries") == [(100, 100)]

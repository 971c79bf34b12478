"""Where dead rows can't be removed: claims go on from where they were, and everything is found all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
import pytest

from perdure import App, Client, Invocation, step
from perdure.engine import bloat, claimer
from perdure.engine.bloat import Bloat, Front, Pace
from perdure.engine.loop import Turns
from perdure.model.ids import first_id, new_id
from perdure.store import arrays
from perdure.store.arrays import Ints, Texts, Times, Uuids
from perdure.store.statements import SHARD, in_schema, statements

from .support import FaultyDatabase, Gate, Sql, register, start, until

LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers take the tables for full of dead rows, and every third look for one that took long."""
    monkeypatch.setattr(bloat, "_MANY", 0)
    monkeypatch.setattr(bloat, "pause_after", lambda seconds: 1.0)


@asynccontextmanager
async def pinned(url: str) -> AsyncIterator[None]:
    """Somebody holds a transaction open, which might still want to see what dies."""
    async with await psycopg.AsyncConnection.connect(url) as other:
        await other.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        await other.execute("SELECT count(*) FROM pg_catalog.pg_class")
        yield


# --- what it costs -------------------------------------------------------------------------------------------------


async def test_a_claim_that_goes_on_does_not_walk_over_the_dead(
    database: FaultyDatabase, me: UUID, sql: Sql, database_url: str, schema: str
) -> None:
    await start(database, 3000)
    sql("ANALYZE queue_entries")
    async with pinned(database_url):
        rows = await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 2800, None, "1")
        last = max((row.enqueued_at, row.workflow_id) for row in rows)
        sql("DELETE FROM queue_entries WHERE worker_id IS NOT NULL")
        claim = (SHARD, me, "q", Texts(["flow"]), 10, None, "1")
        further = (*claim, Ints([0]), Times([last[0]]), Uuids([last[1]]))
        for _ in range(2):  # the first one marks what it finds
            from_the_front = pages(database_url, schema, "claim", claim)
            going_on = pages(database_url, schema, "claim_further", further)
    assert going_on < 40
    assert from_the_front > 60 + going_on


async def test_a_look_for_notes_that_goes_on_does_not_walk_over_the_dead(
    database: FaultyDatabase, sql: Sql, database_url: str, schema: str
) -> None:
    note = "INSERT INTO outbox (shard, id, target_id, created_at) SELECT 1, {0}, {0}, now() FROM generate_series(1, %s)"
    async with pinned(database_url):
        sql(note.format(f"{schema}.note_id(now())"), 5000)
        sql("DELETE FROM outbox")
        ((now,),) = sql("SELECT clock_timestamp()")
        sql(note.format(f"{schema}.note_id(now())"), 10)
        looks = {
            since: [
                pages(database_url, schema, "wake_parents", (SHARD, 500, first_id(since)))
                for _ in range(2)  # the first one marks what it finds
            ][1]
            for since in (None, now)
        }
    assert looks[now] < 20
    assert looks[None] > 40 + looks[now]


async def test_notes_are_in_the_order_of_time(database: FaultyDatabase, sql: Sql, schema: str) -> None:
    before = datetime.now(UTC)
    await start(database)
    ids = [sql(f"SELECT {schema}.note_id(now())")[0][0] for _ in range(3)]
    assert len(set(ids)) == 3
    assert first_id(before - LONG) < min(ids) <= max(ids) < first_id(datetime.now(UTC) + LONG)
    assert {id.version for id in ids} == {4}


def pages(url: str, schema: str, name: str, params: tuple[Any, ...]) -> int:
    """How many pages a statement touches to find and lock what it takes; what it does is undone."""
    text = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {in_schema(statements()[name].text.decode(), schema)}"
    with psycopg.connect(url) as connection:
        arrays.register(connection.adapters)
        row = psycopg.RawCursor(connection).execute(text.encode(), params).fetchone()
        connection.rollback()
    assert row is not None
    (explained,) = row[0] if not isinstance(row[0], str) else json.loads(row[0])
    locking = next(node for node in nodes(explained["Plan"]) if node["Node Type"] == "LockRows")
    return int(locking["Shared Hit Blocks"] + locking["Shared Read Blocks"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


async def test_it_is_known_how_many_rows_are_dead(database: FaultyDatabase, sql: Sql) -> None:
    known = Bloat(database, turns=Turns())
    await start(database, 50)
    sql("DELETE FROM queue_entries")
    async with asyncio.timeout(20):
        while not known.dead:  # the server counts later what a session did; up to 14, when it does something again
            sql("SELECT 1")
            await known.tick()
    assert known.dead >= 50
    assert not known.is_heavy
    assert 0 < known.answer_seconds < 20


async def test_the_heartbeat_counts_what_it_is_asked_for(database: FaultyDatabase, me: UUID, sql: Sql) -> None:
    ids = await start(database, 5)
    await database.attempt("claim", SHARD, me, "q", Texts(["flow"]), 3, None, "1")
    sql("UPDATE queue_entries SET wakes = 2 WHERE workflow_id = %s", ids[0])
    (all,) = await database.attempt("heartbeat", SHARD, me, None)
    (some,) = await database.attempt("heartbeat", SHARD, me, Uuids([ids[0], ids[4], new_id()]))
    assert (all.held, some.held) == ([3, 2], [1, 2])


# --- what is found -------------------------------------------------------------------------------------------------


async def test_claims_that_go_on_take_by_priority_and_no_more_than_their_limit(
    database: FaultyDatabase, me: UUID, sql: Sql
) -> None:
    ids = await start(database, 12)
    sql("UPDATE queue_entries SET priority = 3 WHERE workflow_id = ANY(%s)", ids[8:])
    at = dict(sql("SELECT workflow_id, enqueued_at FROM queue_entries"))
    places = (Ints([3, 0]), Times([at[ids[9]], at[ids[2]]]), Uuids([ids[9], ids[2]]))
    rows = await database.attempt("claim_further", SHARD, me, "q", Texts(["flow"]), 5, None, "1", *places)
    assert {row.workflow_id for row in rows} == {*ids[9:], ids[2], ids[3]}
    assert sql("SELECT count(*) FROM queue_entries WHERE worker_id IS NOT NULL") == [(5,)]


async def test_what_is_behind_the_claims_is_found(
    app: App, client: Client, faulty: FaultyDatabase, heavy: None, sql: Sql
) -> None:
    """What comes later, what has a priority that nobody has seen, and what comes back to an earlier place."""
    further = faulty.hold_answer("claim_further")
    further.leave.set()

    @app.workflow
    async def flow() -> None: ...

    async with app.worker(concurrency=2, lease=LONG):
        handles = await client.start_many(Invocation("flow") for _ in range(40))
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
        async with asyncio.timeout(10):
            await further.happened.wait()
        urgent = await client.start(Invocation("flow"), priority=9)
        old = await client.start(Invocation("flow"))
        sql("UPDATE queue_entries SET enqueued_at = enqueued_at - interval '1 day' WHERE worker_id IS NULL")
        await asyncio.gather(urgent.result(timeout=SOON), old.result(timeout=SOON))


async def test_what_is_held_without_knowing_is_let_go(
    app: App, client: Client, heavy: None, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat counts what is known, so it can't tell: they are compared now and then."""
    monkeypatch.setattr(claimer, "_COMPARE_SECONDS", 0.0)
    gate = Gate()

    @step
    async def inside() -> None:
        await gate.pass_through()

    @app.workflow
    async def flow() -> None:
        await inside()

    async with app.worker(concurrency=1, lease=timedelta(seconds=1)):
        handles = await client.start_many(Invocation("flow") for _ in range(2))
        await gate.has(1)
        sql(
            "UPDATE queue_entries SET epoch = 1, worker_id = (SELECT id FROM worker_rows WHERE status = 'live') "
            "WHERE worker_id IS NULL"
        )
        gate.open()
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))


async def test_the_dead_are_recovered_where_looks_are_rare(
    app: App, client: Client, heavy: None, sql: Sql, database: FaultyDatabase
) -> None:
    @app.workflow
    async def flow() -> None: ...

    dead = await register(database)
    handles = await client.start_many(Invocation("flow") for _ in range(5))
    sql("UPDATE queue_entries SET worker_id = %s, epoch = 1", dead)
    sql("UPDATE worker_rows SET expires_at = now() - interval '1 second' WHERE id = %s", dead)
    async with app.worker(lease=timedelta(seconds=1)):
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))


async def test_timers_are_found_also_those_that_came_late(app: App, client: Client, heavy: None, sql: Sql) -> None:
    @app.workflow
    async def flow() -> None: ...

    async with app.worker(lease=LONG):
        soon = [await client.start(Invocation("flow"), delay=timedelta(seconds=0.1 * n)) for n in range(1, 6)]
        late = await client.start(Invocation("flow"), delay=LONG)
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in soon))
        sql("UPDATE waits SET wake_at = now() - interval '1 hour'")
        await late.result(timeout=SOON)


async def test_notes_are_found_also_those_that_came_late(app: App, client: Client, heavy: None, sql: Sql) -> None:
    @app.workflow
    async def child() -> None: ...

    @app.workflow
    async def parent() -> None:
        await child()

    async with app.worker(lease=LONG):
        await asyncio.gather(*[(await client.start(parent())).result(timeout=SOON) for _ in range(20)])
        await until(sql, "SELECT count(*) = 0 FROM outbox")
        sql("INSERT INTO outbox VALUES (1, %s, %s, NULL, now())", first_id(NOON), new_id())
        await until(sql, "SELECT count(*) = 0 FROM outbox")


# --- paces and places ----------------------------------------------------------------------------------------------


@pytest.fixture
def dead(database: FaultyDatabase) -> Bloat:
    """Many are dead."""
    known = Bloat(database, turns=Turns())
    known.dead = 1_000_000
    return known


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bloat, "now", lambda: clock.now)
    return clock


class Clock:
    now = 100.0

    def take(self, pace: Pace, *seconds: float) -> None:
        """Looks that take so long, one after the other."""
        for each in seconds:
            with pace.look():
                self.now += each

    def rest(self, pace: Pace) -> float:
        """How long it is until the next one, in s."""
        began = self.now
        while not pace.is_due:
            self.now += 0.25
        return self.now - began


def test_looks_that_are_dear_are_followed_by_a_pause_where_many_are_dead(dead: Bloat, clock: Clock) -> None:
    pace = Pace(dead)
    clock.take(pace, 0.5, 0.6)
    assert pace.is_due
    clock.take(pace, 0.7)
    assert clock.rest(pace) == 10.0  # the shortest of three counts
    clock.take(pace, 9, 9, 9)
    assert clock.rest(pace) == 30.0
    clock.take(pace, 0.01)
    assert pace.is_due
    clock.take(pace, 9)
    assert pace.is_due  # one that takes long, as where the process stood still


def test_looks_that_take_no_longer_than_any_answer_are_not_dear(dead: Bloat, clock: Clock) -> None:
    dead._answers.extend([0.6, 0.4, 0.5])
    pace = Pace(dead)
    clock.take(pace, 0.41, 0.41, 0.41)
    assert pace.is_due


def test_looks_that_take_long_where_few_are_dead_change_nothing(database: FaultyDatabase, clock: Clock) -> None:
    pace = Pace(Bloat(database, turns=Turns()))
    clock.take(pace, 5, 5, 5)
    assert pace.is_due


def test_claims_go_on_from_where_they_are(dead: Bloat, clock: Clock) -> None:
    front = Front(dead)
    one, two, first = UUID(int=1), UUID(int=2), UUID(int=0)

    def look(seconds: float, at: int) -> Any:
        with front.look(_at(at)) as places:
            clock.now += seconds
        return places

    for _ in range(3):
        assert look(1, at=30) is None
        front.came_to([_row(7, 1, one), _row(0, 5, one), _row(0, 5, two)], _at(30), is_all=False)
    # Nothing of the higher priority is left, so that one goes on from before now; what is behind it from the last one.
    before = NOON + timedelta(minutes=30, seconds=-15)
    assert look(1, at=30) == ([7, 0], [before, _at(5)], [first, two])
    front.came_to([_row(0, 29, one)], _at(30), is_all=True)
    assert look(1, at=40) == ([7, 0], [_at(30), _at(30)], [first, first])
    assert look(1, at=40) == ([7, 0], [_at(30), _at(30)], [first, first])
    front.came_to([], _at(40), is_all=True)
    a_second_before = NOON + timedelta(minutes=40, seconds=-1)  # that look from earlier was dear three times
    assert look(1, at=40) == ([7, 0], [a_second_before, a_second_before], [first, first])
    clock.now += 60
    assert look(1, at=41) is None
    # So much has come back to the front that claims begin anew there.
    front.came_to([_row(0, 2, one)], _at(41), is_all=False)
    assert look(1, at=41)[1:] == ([_at(41) - timedelta(seconds=15), _at(2)], [first, one])


def test_places_are_kept_for_the_priorities_that_were_met_last(dead: Bloat, clock: Clock) -> None:
    front = Front(dead)
    for priority in range(100):
        front.came_to([_row(priority, 1, UUID(int=1))], _at(2), is_all=False)
    for _ in range(3):
        with front.look(_at(3)):
            clock.now += 1
    with front.look(_at(3)) as places:
        assert places is not None
        assert places[0] == list(range(99, 67, -1))


def _at(minute: int) -> datetime:
    return NOON + timedelta(minutes=minute)


def _row(priority: int, minute: int, id: UUID) -> Any:
    return SimpleNamespace(priority=priority, enqueued_at=_at(minute), workflow_id=id)

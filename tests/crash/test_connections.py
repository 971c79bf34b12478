"""Connections that are cut before and after each kind of commit, or lead into a black hole."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from perdure import App, DatabaseUnavailable, Invocation, telemetry
from perdure.config import Settings
from perdure.store.database import Database
from perdure.store.statements import Statement, statements

from .programs import flows
from .proxy import Damage, Fits, Proxy

Sql = Callable[..., list[Any]]

LEASE = timedelta(seconds=1)
SOON = timedelta(seconds=40)
CUTS: list[Damage] = ["loses", "loses the acknowledgement of"]
SILENCES: list[Damage] = ["swallows", "swallows the answer to"]


@pytest.fixture
def runs(schema: str) -> Callable[[str], Fits]:
    """Whether a request runs that statement of perdure's (or just that text)."""

    def fits(name: str) -> Fits:
        text = name if name.isupper() else statements(schema)[name].text.decode()
        return lambda sql: sql == text

    return fits


@pytest.fixture
async def far(app: App, proxy: Proxy, schema: str, notes: Path) -> AsyncIterator[App]:
    """The app behind the proxy; `app` goes to the server directly."""
    async with flows.build(proxy.url(), schema, notes, statement_timeout=1.0) as far:
        yield far


def test_the_proxy_knows_all_damages_by_name() -> None:
    assert set(CUTS + SILENCES) | {"resets", "delays", "delays the answer to"} == set(get_args(Damage))


async def work_through(far: App, app: App) -> int:
    """Start workflows here (claimed at birth) and elsewhere (claimed from the queue), and wait for all; how many."""
    here = await far.start_many([Invocation("ingest", 2) for _ in range(4)])
    here += [await far.start(Invocation("ingest", 2), key=f"key {number}") for number in range(3)]
    there = await app.start_many([Invocation("ingest", 2) for _ in range(4)])
    assert await asyncio.gather(*(handle.result(timeout=SOON) for handle in here + there)) == [1] * 11
    again = [await app.start(Invocation("ingest", 2), key=f"key {number}") for number in range(3)]
    assert [handle.id for handle in again] == [handle.id for handle in here[-3:]]
    assert all(handle.started for handle in here)
    return 11


@pytest.mark.parametrize("damage", CUTS)
@pytest.mark.parametrize(
    "statement",
    ["start", "start_keyed", "claim", "record", "complete", "heartbeat", "register_worker", "COMMIT"],
)
async def test_a_connection_cut_at_a_commit_costs_nothing(
    far: App, app: App, proxy: Proxy, runs: Any, sql: Sql, nothing_lost: Any, statement: str, damage: Damage
) -> None:
    fault = proxy.plan(damage, runs(statement))
    async with far.worker(lease=LEASE):
        workflows = await work_through(far, app)
        await fault.has_happened()
    nothing_lost(workflows, 2)


@pytest.mark.parametrize("damage", [*CUTS, "resets"])
@pytest.mark.parametrize("statement", ["record", "complete", "COMMIT"])
async def test_a_connection_cut_at_several_commits_in_a_row_costs_nothing(
    far: App, app: App, proxy: Proxy, runs: Any, nothing_lost: Any, statement: str, damage: Damage
) -> None:
    fault = proxy.plan(damage, runs(statement), at=2, times=3)
    async with far.worker(lease=LEASE):
        workflows = await work_through(far, app)
        await fault.has_happened()
    nothing_lost(workflows, 2)


@pytest.mark.parametrize("damage", SILENCES)
@pytest.mark.parametrize("statement", ["start", "start_keyed", "claim", "record", "complete", "heartbeat"])
async def test_a_black_hole_at_a_commit_costs_nothing(
    far: App, app: App, proxy: Proxy, runs: Any, nothing_lost: Any, statement: str, damage: Damage
) -> None:
    fault = proxy.plan(damage, runs(statement))
    async with far.worker(lease=LEASE):
        workflows = await work_through(far, app)
        await fault.has_happened()
    nothing_lost(workflows, 2)


@pytest.mark.parametrize("damage", CUTS)
@pytest.mark.parametrize("statement", ["release", "end_worker"])
async def test_a_connection_cut_during_shutdown_loses_nothing(
    far: App, app: App, proxy: Proxy, runs: Any, sql: Sql, events: Any, statement: str, damage: Damage
) -> None:
    fault = proxy.plan(damage, runs(statement))
    async with far.worker(lease=LEASE, grace=timedelta(0)):
        handle = await far.start(Invocation("stuck"))
        await events.wait_for(telemetry.StepStarted, lambda event: event.key == "stuck_once")
    await fault.has_happened()
    assert sql("SELECT worker_id, recoveries FROM queue_entries") == [(None, 0)]
    assert sql("SELECT status FROM workers") == [("stopped",)]
    async with app.worker(lease=LEASE):
        assert await handle.result(timeout=SOON) == "free"


@pytest.mark.parametrize("damage", CUTS)
async def test_a_connection_cut_while_others_are_recovered_loses_nothing(
    far: App, app: App, proxy: Proxy, runs: Any, spawn: Any, sql: Sql, damage: Damage
) -> None:
    victim = spawn(lease=1.0)
    await victim.said("WorkerStarted")
    handle = await app.start(Invocation("stuck"))
    await victim.said("StepStarted", lambda event: event["key"] == "stuck_once")
    faults = [proxy.plan(damage, runs(statement)) for statement in ("bury", "recover", "load")]
    async with far.worker(lease=LEASE):
        victim.kill()
        assert await handle.result(timeout=SOON) == "free"
        for fault in faults:
            await fault.has_happened()
    assert (await handle.describe()).recoveries == 1


@pytest.mark.parametrize("damage", CUTS)
@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
async def test_a_start_is_acknowledged_once_whatever_happens_to_its_connection(
    far: App, app: App, proxy: Proxy, runs: Any, sql: Sql, keyed: bool, damage: Damage
) -> None:
    # An acknowledgement of a plain start is lost once: then it finds out, and doesn't send again.
    times = 1 if damage == "loses the acknowledgement of" and not keyed else 2
    fault = proxy.plan(damage, runs("start_keyed" if keyed else "start"), times=times)
    handle = await far.start(Invocation("ingest", 1), key="key" if keyed else None)
    await fault.has_happened()
    assert handle.started
    assert sql("SELECT id, status FROM workflows") == [(handle.id, "pending")]


@pytest.mark.parametrize("damage", CUTS)
@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
async def test_a_delayed_start_is_acknowledged_once_whatever_happens_to_its_connection(
    far: App, app: App, proxy: Proxy, runs: Any, sql: Sql, keyed: bool, damage: Damage
) -> None:
    fault = proxy.plan(damage, runs("start_keyed"))
    handle = await far.start(Invocation("ingest", 1), key="key" if keyed else None, delay=timedelta(hours=1))
    await fault.has_happened()
    assert handle.started
    assert sql("SELECT id, status FROM workflows") == [(handle.id, "waiting")]


@pytest.mark.parametrize("damage", CUTS)
async def test_a_start_that_replaces_a_finished_one_is_made_once(
    far: App, app: App, proxy: Proxy, runs: Any, sql: Sql, damage: Damage
) -> None:
    async with app.worker(lease=LEASE):
        first = await app.start(Invocation("ingest", 1), key="key")
        await first.result(timeout=SOON)
    fault = proxy.plan(damage, runs("COMMIT"))
    second = await far.start(Invocation("ingest", 1), key="key", on_conflict="replace_finished")
    await fault.has_happened()
    assert second.started
    rows = sql("SELECT id, key, status FROM workflows ORDER BY created_at")
    assert rows == [(first.id, None, "success"), (second.id, "key", "pending")]


async def test_a_client_that_gives_up_in_doubt_is_told_so(
    app: App, proxy: Proxy, runs: Any, schema: str, notes: Path, sql: Sql
) -> None:
    async with flows.build(proxy.url(), schema, notes, statement_timeout=0.3) as hasty:
        hasty.settings = dataclasses.replace(hasty.settings, connect_timeout=timedelta(seconds=0.5))
        await hasty.session().database.fetch("clock")
        proxy.plan("swallows the answer to", runs("start_keyed"), times=1000)
        with pytest.raises(DatabaseUnavailable) as caught:
            await hasty.start(Invocation("ingest", 1), key="key")
        assert caught.value.outcome_unknown
    again = await app.start(Invocation("ingest", 1), key="key")
    assert not again.started
    assert sql("SELECT count(*) FROM workflows") == [(1,)]


async def test_a_flush_that_arrives_after_somebody_has_taken_over_writes_nothing(
    app: App, proxy: Proxy, runs: Any, schema: str, spawn: Any, sql: Sql, notes: Path
) -> None:
    """The request is on its way while the lease runs out, another worker takes over and ends the workflow."""
    late = proxy.plan("delays", runs("record"))
    async with flows.build(proxy.url(), schema, notes) as far, far.worker(lease=LEASE) as worker:
        first_id = worker.worker_id
        flows.wake_up(notes)
        handle = await far.start(Invocation("sleeps"))
        await late.has_happened()
        for statement in ("heartbeat", "register_worker"):
            proxy.plan("loses", runs(statement), times=1_000_000)
        heir = spawn(lease=1.0)
        assert await app.handle(handle.id).result(timeout=SOON) == heir.pid
        rows = sql("SELECT * FROM checkpoints ORDER BY key")
        late.let_go()
    # The worker's end waited for the flush.
    assert sql("SELECT * FROM checkpoints ORDER BY key") == rows
    assert sql("SELECT count(*) FROM checkpoints WHERE worker_id = %s", first_id) == [(0,)]
    assert len([one for one in flows.noted(notes) if one["what"] == "nap"]) == 2


async def test_a_worker_in_a_black_hole_ends_its_runs_when_its_lease_is_over(
    far: App, app: App, proxy: Proxy, sql: Sql, events: Any, notes: Path
) -> None:
    """Nothing is refused, nothing is answered, and new connections are accepted in silence."""
    loop = asyncio.get_running_loop()
    async with far.worker(lease=LEASE) as worker:
        first_id = worker.worker_id
        handle = await far.start(Invocation("stuck"))
        await events.wait_for(telemetry.StepStarted, lambda event: event.key == "stuck_once")
        began = loop.time()
        proxy.is_silent = True
        await events.wait_for(telemetry.LeaseLost, lambda event: event.worker_id == first_id)
        await events.wait_for(telemetry.RunAbandoned, lambda event: event.workflow_id == handle.id)
        took = loop.time() - began
        proxy.speak()
        assert await handle.result(timeout=SOON) == "free"
    assert took <= LEASE.total_seconds() + 0.5


async def test_everything_goes_on_after_a_black_hole(
    far: App, app: App, proxy: Proxy, until: Any, events: Any, nothing_lost: Any
) -> None:
    async with far.worker(lease=LEASE):
        handles = await far.start_many([Invocation("ingest", 4) for _ in range(30)])
        results = [asyncio.ensure_future(handle.result(timeout=SOON)) for handle in handles]
        await until("SELECT count(*) >= 20 FROM effects")
        proxy.is_silent = True
        await events.wait_for(telemetry.LeaseLost)
        proxy.speak()
        assert await asyncio.gather(*results) == [6] * 30
    nothing_lost(30, 4)


async def test_connections_that_are_cut_again_and_again_lose_nothing(
    far: App, app: App, proxy: Proxy, until: Any, nothing_lost: Any
) -> None:
    async with far.worker(lease=timedelta(seconds=3)):
        handles = await far.start_many([Invocation("ingest", 5) for _ in range(40)])
        results = [asyncio.ensure_future(handle.result(timeout=SOON)) for handle in handles]
        for goal in range(10, 200, 10):
            await until("SELECT count(*) >= %s FROM effects", goal)
            proxy.cut()
        assert await asyncio.gather(*results) == [10] * 40
    nothing_lost(40, 5)


async def test_a_statement_that_is_given_up_closes_its_connection_and_asks_for_nothing_else(
    proxy: Proxy, schema: str, until: Any
) -> None:
    """A request to cancel would be a connection of its own, of which old PgBouncers die."""
    database = Database(Settings(database_url=proxy.url(), schema=schema))
    await database.fetch("clock")
    before = proxy.accepted
    try:
        async with database.connection() as connection:
            nap = Statement(name="nap", text=f"SELECT pg_sleep(60), '{schema}'".encode())
            napping = asyncio.ensure_future(database.execute(connection, nap, ()))
            await until(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE %s", f"SELECT pg_sleep(60), '{schema}'"
            )
            napping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await napping
            assert connection.closed
        assert proxy.accepted == before
        await database.fetch("clock")
        assert proxy.accepted == before + 1
    finally:
        await database.close()

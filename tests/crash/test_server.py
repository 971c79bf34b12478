"""The server is restarted, crashes, is away for long, or throws everybody out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from perdure import App, DatabaseUnavailable, Invocation
from perdure.embedded import Cluster

from .processes import WorkerProcess
from .programs import flows

Spawn = Callable[..., WorkerProcess]
Sql = Callable[..., list[Any]]

SOON = timedelta(seconds=60)


def fast(cluster: Cluster) -> None:
    cluster.restart(mode="fast")


def immediate(cluster: Cluster) -> None:
    cluster.restart(mode="immediate")


def kill(cluster: Cluster) -> None:
    cluster.kill()
    cluster.start(keep=False)


@pytest.mark.parametrize("restart", [fast, immediate, kill])
async def test_work_goes_on_by_itself_after_a_restart_in_the_middle(
    app: App,
    cluster: Cluster,
    spawn: Spawn,
    sql: Sql,
    until: Any,
    nothing_lost: Any,
    restart: Callable[[Cluster], None],
) -> None:
    workers = [spawn(lease=3.0), spawn(lease=3.0)]
    for worker in workers:
        await worker.said("WorkerStarted")
    handles = await app.start_many([Invocation("ingest", 4) for _ in range(60)])
    results = [asyncio.ensure_future(handle.result(timeout=SOON)) for handle in handles]
    for count in (30, 120):
        await until("SELECT count(*) >= %s FROM effects", count)
        await asyncio.to_thread(restart, cluster)
    assert await asyncio.gather(*results) == [6] * 60
    nothing_lost(60, 4)
    assert all(worker.is_alive for worker in workers)


async def test_an_outage_longer_than_the_lease_loses_nothing(
    app: App, cluster: Cluster, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    workers = [spawn(lease=1.0), spawn(lease=1.0)]
    for worker in workers:
        await worker.said("WorkerStarted")
    handles = await app.start_many([Invocation("ingest", 4) for _ in range(60)])
    results = [asyncio.ensure_future(handle.result(timeout=SOON)) for handle in handles]
    await until("SELECT count(*) >= 30 FROM effects")
    await asyncio.to_thread(cluster.stop, mode="immediate")
    for worker in workers:
        await worker.said("LeaseLost")
    await asyncio.to_thread(cluster.start, keep=False)
    assert await asyncio.gather(*results) == [6] * 60
    nothing_lost(60, 4)
    assert all(worker.is_alive for worker in workers)


async def test_in_an_outage_shorter_than_the_lease_bodies_go_on(
    app: App, cluster: Cluster, spawn: Spawn, sql: Sql, notes: Path
) -> None:
    worker = spawn(lease=8.0)
    await worker.said("WorkerStarted")
    handle = await app.start(Invocation("sleeps"))
    await worker.said("StepStarted")
    result = asyncio.ensure_future(handle.result(timeout=SOON))
    await asyncio.to_thread(cluster.stop)
    flows.wake_up(notes)
    await worker.said("StepEnded")  # its outcome waits to be written
    await asyncio.to_thread(cluster.start, keep=False)
    assert await result == worker.pid
    assert worker.all("LeaseLost") == []
    assert [one["what"] for one in flows.noted(notes)] == ["nap", "work 1"]
    assert (await handle.describe()).recoveries == 0


async def test_a_worker_that_starts_while_the_server_is_down_says_so_and_begins_when_it_is_up(
    app: App, cluster: Cluster, spawn: Spawn, sql: Sql, nothing_lost: Any
) -> None:
    handles = await app.start_many([Invocation("ingest", 2) for _ in range(5)])
    await asyncio.to_thread(cluster.stop)
    worker = spawn(lease=1.0)
    try:
        await worker.said("DatabaseLost", timeout=10)
    finally:
        await asyncio.to_thread(cluster.start, keep=False)
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    nothing_lost(5, 2)


async def test_a_worker_that_starts_while_the_server_is_down_begins_when_it_is_up(
    app: App, cluster: Cluster, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    handles = await app.start_many([Invocation("ingest", 2) for _ in range(5)])
    veteran = spawn(lease=1.0)
    await veteran.said("WorkerStarted")
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    await asyncio.to_thread(cluster.stop)
    newcomer = spawn(lease=1.0)
    await veteran.said("LeaseLost")  # it has been away for longer than the lease
    veteran.kill()
    await asyncio.to_thread(cluster.start, keep=False)
    await newcomer.said("WorkerStarted")
    more = await app.start_many([Invocation("ingest", 2) for _ in range(5)])
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in more))
    nothing_lost(10, 2)


async def test_starts_under_one_key_over_an_outage_make_one_workflow(
    app: App, cluster: Cluster, database_url: str, schema: str, notes: Path, spawn: Spawn, sql: Sql, nothing_lost: Any
) -> None:
    worker = spawn(lease=1.0)
    await worker.said("WorkerStarted")
    async with flows.build(database_url, schema, notes) as other:
        await asyncio.to_thread(cluster.stop)
        starts = [
            asyncio.ensure_future(client.start(Invocation("ingest", 3), key="the one"))
            for client in (app, other, app, other)
        ]
        unkeyed = [asyncio.ensure_future(app.start(Invocation("ingest", 3))) for _ in range(3)]
        await worker.said("LeaseLost")
        await asyncio.to_thread(cluster.start, keep=False)
        handles = await asyncio.gather(*starts)
        assert len({handle.id for handle in handles}) == 1
        assert sum(handle.started for handle in handles) == 1
        assert [await handle.result(timeout=SOON) for handle in handles] == [3] * 4
        assert [await (await start).result(timeout=SOON) for start in unkeyed] == [3] * 3
    nothing_lost(4, 3)


async def test_a_client_whose_patience_ends_is_told_and_may_start_again_under_the_same_key(
    cluster: Cluster, app: App, database_url: str, schema: str, notes: Path, spawn: Spawn, nothing_lost: Any
) -> None:
    async with flows.build(database_url, schema, notes) as hasty:
        hasty.settings = dataclasses.replace(hasty.settings, connect_timeout=timedelta(seconds=0.3))
        await asyncio.to_thread(cluster.stop)
        with pytest.raises(DatabaseUnavailable):
            await hasty.start(Invocation("ingest", 1), key="again")
        with pytest.raises(DatabaseUnavailable):
            await hasty.start(Invocation("ingest", 1))
        await asyncio.to_thread(cluster.start, keep=False)
        spawn(lease=1.0)
        first = await hasty.start(Invocation("ingest", 1), key="again")
        second = await hasty.start(Invocation("ingest", 1), key="again")
        assert (first.started, second.started) == (True, False)
        assert await first.result(timeout=SOON) == await second.result(timeout=SOON) == 0
    nothing_lost(1, 1)


async def test_a_client_that_waits_gets_the_result_after_the_outage(
    app: App, cluster: Cluster, spawn: Spawn, notes: Path
) -> None:
    worker = spawn(lease=8.0)
    await worker.said("WorkerStarted")
    handle = await app.start(Invocation("sleeps"))
    result = asyncio.ensure_future(handle.result())
    await worker.said("StepStarted")
    await asyncio.to_thread(cluster.stop)
    flows.wake_up(notes)
    await worker.said("StepEnded")
    assert not result.done()
    await asyncio.to_thread(cluster.start, keep=False)
    async with asyncio.timeout(30):
        assert await result == worker.pid


async def test_backends_that_are_terminated_again_and_again_under_load_lose_nothing(
    app: App, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    workers = [spawn(lease=3.0), spawn(lease=3.0)]
    for worker in workers:
        await worker.said("WorkerStarted")
    count, rounds = 80, 4

    async def start_some() -> list[Any]:
        return [await app.start(Invocation("ingest", rounds), key=f"key {number}") for number in range(count)]

    starting = asyncio.ensure_future(start_some())
    terminated = 0
    for goal in range(20, count * rounds, 20):
        await until("SELECT count(*) >= %s FROM effects", goal)
        ((hit,),) = sql(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = 'perdure' AND pid <> pg_backend_pid()"
        )
        terminated += hit
    assert terminated > 30
    handles = await starting
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    nothing_lost(count, rounds)
    assert all(worker.is_alive for worker in workers)

"""Workers that are killed, frozen, stopped, blocked, or kill themselves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from perdure import App, Invocation, RecoveryLimitExceeded, Status

from .processes import WorkerProcess
from .programs.flows import noted, wake_up

Spawn = Callable[..., WorkerProcess]
Sql = Callable[..., list[Any]]

LEASE = 2.0
SOON = timedelta(seconds=40)


def seconds_until_taken_over(sql: Sql, id: UUID, key: str, since: Any) -> float:
    """From an instant of the database's clock to the begin of that step's recorded body, by the same clock."""
    ((seconds,),) = sql(
        "SELECT date_part('epoch', started_at - %s) FROM workflow_steps WHERE workflow_id = %s AND key = %s",
        since,
        id,
        key,
    )
    return float(seconds)


def now(sql: Sql) -> Any:
    return sql("SELECT clock_timestamp()")[0][0]


def bodies(notes: Path, what: str) -> int:
    return sum(one["what"] == what for one in noted(notes))


async def both_serve(*workers: WorkerProcess) -> None:
    """Wait until workers are up."""
    for worker in workers:
        await worker.said("WorkerStarted")


async def stuck(worker: WorkerProcess, step: str) -> dict[str, Any]:
    return await worker.said("StepStarted", lambda event: event["key"] == step)


async def test_a_worker_killed_in_a_step_is_taken_over_within_its_lease_and_two_seconds(
    app: App, spawn: Spawn, sql: Sql, notes: Path
) -> None:
    first = spawn(lease=LEASE)
    await first.said("WorkerStarted")
    handle = await app.start(Invocation("stuck"))
    await stuck(first, "stuck_once")
    second = spawn(lease=LEASE)
    await second.said("WorkerStarted")
    killed_at = now(sql)
    first.kill()
    assert await handle.result(timeout=SOON) == "free"
    taken_over = seconds_until_taken_over(sql, handle.id, "stuck_once", killed_at)
    assert 0 < taken_over <= LEASE + 2
    assert (await handle.describe()).recoveries == 1
    # What was recorded is served; only the body that was under way ran again.
    assert [bodies(notes, what) for what in ("work 0", "stuck_once", "work 1")] == [1, 2, 1]


async def test_workers_killed_under_load_lose_nothing_and_repeat_no_effect(
    app: App, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    workers = [spawn(lease=LEASE), spawn(lease=LEASE)]
    await both_serve(*workers)
    handles = await app.start_many([Invocation("ingest", 4) for _ in range(80)])
    await until("SELECT count(*) >= 80 FROM effects")
    workers[0].kill()
    workers.append(spawn(lease=LEASE))
    await until("SELECT count(*) >= 160 FROM effects")
    workers[1].kill()
    assert await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles)) == [6] * 80
    assert sql("SELECT count(*) > 0 FROM workflows WHERE recoveries > 0") == [(True,)], "they hit nothing in flight"
    nothing_lost(80, 4)


async def test_after_all_workers_were_killed_a_new_one_goes_on(
    app: App, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    workers = [spawn(lease=LEASE), spawn(lease=LEASE)]
    await both_serve(*workers)
    handles = await app.start_many([Invocation("ingest", 5) for _ in range(30)])
    await until("SELECT count(*) >= 20 FROM effects")
    for worker in workers:
        worker.kill()
    assert sql("SELECT count(*) > 0 FROM queue_entries WHERE worker_id IS NOT NULL") == [(True,)]
    spawn(lease=LEASE)
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    nothing_lost(30, 5)


async def test_a_frozen_worker_records_nothing_when_it_wakes_up_and_ends_its_runs(
    app: App, spawn: Spawn, sql: Sql, until: Any, notes: Path
) -> None:
    zombie = spawn(lease=LEASE)
    await zombie.said("WorkerStarted")
    # One is stuck in a body; the other's body ends as soon as the process goes on: it has an outcome to record.
    stuck_handle = await app.start(Invocation("stuck"))
    nap_handle = await app.start(Invocation("sleeps"))
    await stuck(zombie, "stuck_once")
    await stuck(zombie, "nap")
    zombie_id = zombie.all("WorkerStarted")[0]["worker_id"]
    frozen_at = now(sql)
    zombie.send(signal.SIGSTOP)
    wake_up(notes)
    heir = spawn(lease=LEASE)
    assert await stuck_handle.result(timeout=SOON) == "free"
    assert await nap_handle.result(timeout=SOON) == heir.pid
    # By then the heir had to start (its process and its own unbroken lease); the next test measures a take-over.
    assert seconds_until_taken_over(sql, stuck_handle.id, "stuck_once", frozen_at) > 0
    before = sql("SELECT * FROM checkpoints ORDER BY workflow_id, key")
    woken_at = now(sql)
    zombie.send(signal.SIGCONT)
    await zombie.said("LeaseLost", lambda event: event["worker_id"] == zombie_id)
    for handle in (stuck_handle, nap_handle):
        await zombie.said("RunAbandoned", lambda event, id=str(handle.id): event["workflow_id"] == id)
    # It has a new id, and is of use again.
    heir.kill()
    assert await (await app.start(Invocation("sleeps"))).result(timeout=SOON) == zombie.pid
    assert sql("SELECT count(*) FROM checkpoints WHERE worker_id = %s AND created_at > %s", zombie_id, woken_at) == [
        (0,)
    ]
    ids = [stuck_handle.id, nap_handle.id]
    assert sql("SELECT * FROM checkpoints WHERE workflow_id = ANY(%s) ORDER BY workflow_id, key", ids) == before
    assert bodies(notes, "stuck_once") == 2
    assert bodies(notes, "work 1") == 3, "the zombie began a step of a run that it had lost"


async def test_a_frozen_worker_is_taken_over_within_its_lease_and_two_seconds(app: App, spawn: Spawn, sql: Sql) -> None:
    zombie = spawn(lease=LEASE)
    await zombie.said("WorkerStarted")
    handle = await app.start(Invocation("stuck"))
    await stuck(zombie, "stuck_once")
    heir = spawn(lease=LEASE)
    await heir.said("WorkerStarted")
    frozen_at = now(sql)
    zombie.send(signal.SIGSTOP)
    assert await handle.result(timeout=SOON) == "free"
    assert 0 < seconds_until_taken_over(sql, handle.id, "stuck_once", frozen_at) <= LEASE + 2


async def test_a_worker_frozen_in_a_transaction_does_not_hold_up_the_one_that_takes_over(
    app: App, spawn: Spawn, sql: Sql, until: Any, notes: Path
) -> None:
    zombie = spawn(lease=LEASE)
    await zombie.said("WorkerStarted")
    handle = await app.start(Invocation("stuck_in_transaction"))
    await stuck(zombie, "stuck_once_in_transaction")
    await until("SELECT count(*) > 0 FROM pg_stat_activity WHERE state = 'idle in transaction'")
    zombie.send(signal.SIGSTOP)
    wake_up(notes)
    heir = spawn(lease=LEASE)
    assert await handle.result(timeout=SOON) == 1
    zombie.send(signal.SIGCONT)
    await zombie.said("LeaseLost")
    await zombie.said("RunAbandoned")
    assert sql("SELECT count(*), min(pid) FROM effects") == [(1, heir.pid)]


async def test_a_worker_that_is_asked_to_stop_hands_over_at_once(app: App, spawn: Spawn, sql: Sql, notes: Path) -> None:
    lease = 60.0  # nobody waits for that
    first = spawn(lease=lease, grace=0.0)
    await first.said("WorkerStarted")
    handle = await app.start(Invocation("stuck"))
    await stuck(first, "stuck_once")
    second = spawn(lease=lease)
    await second.said("WorkerStarted")
    asked_at = now(sql)
    first.send(signal.SIGTERM)
    assert await handle.result(timeout=timedelta(seconds=15)) == "free"
    assert await first.ended() == 0
    assert seconds_until_taken_over(sql, handle.id, "stuck_once", asked_at) < 3
    assert (await handle.describe()).recoveries == 0, "an orderly hand-over is no recovery"
    assert bodies(notes, "work 0") == 1
    assert sql("SELECT status, count(*) FROM workers GROUP BY status ORDER BY status") == [("live", 1), ("stopped", 1)]


async def test_a_worker_that_is_asked_to_stop_lets_its_steps_end_and_begins_no_other(
    app: App, spawn: Spawn, sql: Sql, notes: Path
) -> None:
    first = spawn(lease=60.0, grace=20.0)
    await first.said("WorkerStarted")
    handle = await app.start(Invocation("sleeps"))
    await stuck(first, "nap")
    second = spawn(lease=60.0)
    await second.said("WorkerStarted")
    first.send(signal.SIGTERM)
    await first.said("Stopping")
    wake_up(notes)
    assert await handle.result(timeout=SOON) == first.pid
    assert await first.ended() == 0
    assert bodies(notes, "nap") == 1
    assert [one["pid"] for one in noted(notes) if one["what"] == "work 1"] == [second.pid]
    assert (await handle.describe()).recoveries == 0


async def test_workers_that_are_replaced_one_by_one_lose_nothing(
    app: App, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    worker = spawn(lease=60.0)
    await worker.said("WorkerStarted")
    handles = await app.start_many([Invocation("ingest", 4) for _ in range(60)])
    for count in (40, 120):
        await until("SELECT count(*) >= %s FROM effects", count)
        successor = spawn(lease=60.0)
        await successor.said("WorkerStarted")
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
        worker = successor
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    nothing_lost(60, 4)
    assert sql("SELECT max(recoveries) FROM workflows") == [(0,)]


async def test_a_step_that_blocks_the_event_loop_for_longer_than_the_lease_keeps_it_and_is_reported(
    app: App, spawn: Spawn, sql: Sql, notes: Path
) -> None:
    worker, other = spawn(lease=LEASE), spawn(lease=LEASE)
    await both_serve(worker, other)
    handle = await app.start(Invocation("blocks", LEASE * 3))
    assert await handle.result(timeout=SOON) == "unblocked"
    assert bodies(notes, "block") == 1
    assert (await handle.describe()).recoveries == 0
    blocked = worker.all("LoopBlocked") + other.all("LoopBlocked")
    assert blocked, "nobody was told"
    assert "time.sleep(seconds)" in blocked[0]["stack"]
    assert worker.all("LeaseLost") + other.all("LeaseLost") == []


@pytest.mark.parametrize("progress", [0, 2])
async def test_a_workflow_that_kills_its_workers_ends_in_error(
    app: App, spawn: Spawn, sql: Sql, notes: Path, progress: int
) -> None:
    most = 2
    handle = await app.start(Invocation("kills", progress))
    deaths = 0
    worker = spawn(lease=1.0, max_recoveries=most)
    waiting = asyncio.ensure_future(handle.result(timeout=SOON))
    while not waiting.done():
        dying = asyncio.ensure_future(worker.ended(60))
        await asyncio.wait({waiting, dying}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            worker.kill()
            await dying
        else:
            deaths += 1
            assert deaths <= most + 1, "there is no end to it"
            worker = spawn(lease=1.0, max_recoveries=most)
    with pytest.raises(RecoveryLimitExceeded) as caught:
        waiting.result()
    assert caught.value.recoveries == most
    # A life in which something was recorded isn't counted: that one made progress.
    assert deaths == most + (progress > 0)
    assert bodies(notes, "kill") == deaths
    description = await handle.describe()
    assert description.status is Status.ERROR
    assert "RecoveryLimitExceeded" in description.error["type"]


async def test_a_workflow_that_makes_progress_in_each_life_is_never_given_up(
    app: App, spawn: Spawn, sql: Sql, until: Any, nothing_lost: Any
) -> None:
    handle = await app.start(Invocation("ingest", 150))
    for life in (1, 2):
        worker = spawn(lease=1.0, max_recoveries=1)
        await worker.said("StepStarted")
        recorded = sql("SELECT count(*) FROM effects")[0][0]
        await until("SELECT count(*) > %s FROM effects", recorded + 2)
        worker.kill()
        assert (await handle.describe()).recoveries == life - 1
    spawn(lease=1.0, max_recoveries=1)
    await handle.result(timeout=SOON)
    nothing_lost(1, 150)

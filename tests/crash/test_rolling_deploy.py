"""Two versions of the code side by side: each takes over what the other began, in both directions."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from perdure import App, Handle, Invocation

from .processes import WorkerProcess
from .programs import deploys, flows

Sql = Callable[..., list[Any]]
Deploy = Callable[..., WorkerProcess]

LEASE = 1.0
SOON = timedelta(seconds=60)
ROUNDS = 10


@pytest.fixture
async def apps(database_url: str, schema: str, notes: Path) -> AsyncIterator[dict[str, App]]:
    """Each version as a client; the tables are there."""
    async with AsyncExitStack() as stack:
        apps = {
            version: await stack.enter_async_context(deploys.build(database_url, schema, notes, version))
            for version in deploys.VERSIONS
        }
        await apps["1"].session().database.fetch("clock")
        async with await psycopg.AsyncConnection.connect(database_url, options=f"-c search_path={schema}") as setup:
            await setup.execute(flows.EFFECTS)
        yield apps


@pytest.fixture
def deploy(database_url: str, schema: str, notes: Path) -> Iterator[Deploy]:
    """Start worker processes of a version; whatever the test leaves of them is killed."""
    processes: list[WorkerProcess] = []

    def start(version: str, *, lease: float = LEASE) -> WorkerProcess:
        process = WorkerProcess(
            program="deployed_worker.py",
            url=database_url,
            schema=schema,
            notes=str(notes),
            version=version,
            lease=lease,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.dispose()


async def begin(app: App, count: int) -> list[Handle[list[str]]]:
    return list(await app.start_many([Invocation("order", number, ROUNDS) for number in range(count)]))


def all_is_right(sql: Sql, workflows: int) -> None:
    """All have ended, each effect is there once, and each workflow's result says what was recorded."""
    assert sql("SELECT status, count(*) FROM workflows GROUP BY status") == [("success", workflows)]
    assert sql("SELECT count(*) FROM queue_entries") == [(0,)]
    wanted = workflows * ROUNDS
    assert sql("SELECT count(*), count(DISTINCT (workflow_id, ordinal)) FROM effects") == [(wanted, wanted)]
    steps: dict[Any, dict[str, Any]] = {}
    for id, key, output in sql("SELECT workflow_id, key, output FROM workflow_steps"):
        steps.setdefault(id, {})[key] = output
    for id, output in sql("SELECT id, output FROM workflows"):
        recorded = steps[id]
        with_insurance = [recorded["price"], recorded["charge"], recorded.get("insure"), recorded["ship"]]
        without = [recorded["price"], recorded["charge"], recorded["ship"]]
        assert output in (with_insurance, without)
        if output == with_insurance:
            assert recorded["patched(insurance)"] is True
        if "patched(insurance)" in recorded and recorded["ship"] == "shipped by 2":
            assert output == with_insurance, "it took another path than the one that was recorded"
        assert {f"work#{n}" if n > 1 else "work" for n in range(1, ROUNDS + 1)} <= set(recorded)


def taken_over(sql: Sql, began: str, by: str) -> int:
    """How many workflows that began under one version have checkpoints of both."""
    query = (
        "SELECT count(*) FROM workflows AS w WHERE version = %s "
        "AND EXISTS (SELECT 1 FROM workflow_steps WHERE workflow_id = w.id AND version = %s) "
        "AND EXISTS (SELECT 1 FROM workflow_steps WHERE workflow_id = w.id AND version = %s)"
    )
    return int(sql(query, began, began, by)[0][0])


async def amid(worker: WorkerProcess, until: Any) -> None:
    """Wait until it is in the middle of a few workflows."""
    started = await worker.said("WorkerStarted")
    await until(
        "SELECT count(DISTINCT held.workflow_id) >= 5 FROM queue_entries AS held JOIN checkpoints AS step "
        "ON step.workflow_id = held.workflow_id AND step.worker_id = held.worker_id AND step.kind = 'step' "
        "WHERE held.worker_id = %s",
        started["worker_id"],
    )


async def test_a_deploy_and_its_roll_back_lose_nothing(
    apps: dict[str, App], deploy: Deploy, sql: Sql, until: Any
) -> None:
    """Workers are replaced in order: 1 by 2, 2 by 1 again, and 1 by 2; what each began goes on in the next."""
    worker, version = deploy("1", lease=60.0), "1"
    await worker.said("WorkerStarted")
    for following in ("2", "1", "2"):
        successor = deploy(following, lease=60.0)
        await successor.said("WorkerStarted")
        handles = await begin(apps[version], 40)
        await amid(worker, until)
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
        worker, version = successor, following
    all_is_right(sql, 120)
    assert sql("SELECT max(recoveries) FROM workflows") == [(0,)]
    assert taken_over(sql, "1", by="2") > 0, "it hit nothing in flight"
    assert taken_over(sql, "2", by="1") > 0, "it hit nothing in flight"


async def test_versions_side_by_side_that_are_killed_lose_nothing(
    apps: dict[str, App], deploy: Deploy, sql: Sql, until: Any
) -> None:
    """Each is killed in turn, the other one ends what both had begun, and the first comes back."""
    workers = {"1": deploy("1"), "2": deploy("2")}
    for worker in workers.values():
        await worker.said("WorkerStarted")
    for version in ("1", "2", "1"):
        handles = [*await begin(apps["1"], 20), *await begin(apps["2"], 20)]
        await amid(workers[version], until)
        workers[version].kill()
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
        workers[version] = deploy(version)
        await workers[version].said("WorkerStarted")
    all_is_right(sql, 120)
    assert sql("SELECT count(*) > 0 FROM workflows WHERE recoveries > 0") == [(True,)], "they hit nothing in flight"
    assert taken_over(sql, "1", by="2") + taken_over(sql, "2", by="1") > 0, "it hit nothing in flight"


@pytest.mark.parametrize(("began", "goes_on"), [("1", "2"), ("2", "1")])
async def test_all_of_a_killed_version_goes_on_in_the_other(
    apps: dict[str, App], deploy: Deploy, sql: Sql, until: Any, began: str, goes_on: str
) -> None:
    first = deploy(began)
    await first.said("WorkerStarted")
    handles = await begin(apps[began], 40)
    await amid(first, until)
    first.kill()
    deploy(goes_on)
    await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    all_is_right(sql, 40)
    assert taken_over(sql, began, by=goes_on) > 0, "it hit nothing in flight"


async def test_a_pinned_old_worker_ends_what_it_began_while_the_new_one_takes_the_rest(
    apps: dict[str, App], deploy: Deploy, sql: Sql, until: Any
) -> None:
    handles = await begin(apps["1"], 30)
    async with apps["2"].worker(only_version=True, concurrency=20):
        handles += await begin(apps["2"], 30)
        async with apps["1"].worker(only_version=True, concurrency=20):
            await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    all_is_right(sql, 60)
    assert sql(
        "SELECT count(*) FROM checkpoints AS c JOIN workflow_rows AS w ON w.id = c.workflow_id "
        "WHERE c.version <> w.version"
    ) == [(0,)]

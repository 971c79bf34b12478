"""What the doctor says of a server, of the way to it, and of the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from perdure import App, Client, Invocation, embedded, sleep
from perdure.config import Settings
from perdure.doctor import Finding, Level, examine
from perdure.embedded import Cluster

Sql = Callable[..., list[Any]]
Look = Callable[[str], Any]


@pytest.fixture
async def look(app: App, database_url: str, schema: str) -> Look:
    """The findings of a check."""
    await app.session().database.fetch("clock")
    settings = Settings(database_url=database_url, schema=schema, migrate=False, read_only=True)

    async def of(check: str) -> list[Finding]:
        return [finding for finding in await examine(settings) if finding.check == check]

    return of


# --- all is well -----------------------------------------------------------------------------------------------------


async def test_nothing_is_wrong_where_nothing_is(app: App, database_url: str, schema: str) -> None:
    @app.workflow
    async def nap() -> None:
        await sleep(timedelta(days=1))

    async with app.worker():
        await app.start(nap())
        findings = await examine(Settings(database_url=database_url, schema=schema, migrate=False, read_only=True))
    wrong = [finding for finding in findings if finding.level is not Level.OK]
    assert [finding.text for finding in wrong] == [
        "fsync is off: after a crash of the machine the database may be lost"
    ]
    checks = {finding.check for finding in findings}
    assert checks >= {"server", "latency", "clock", "pooler", "hints", "schema", "rights", "xmin", "bloat"}
    assert checks >= {"autovacuum", "workers", "queues", "names", "stuck"}


async def test_a_server_that_cannot_be_reached_is_the_only_finding() -> None:
    settings = Settings(database_url="postgresql://nobody@127.0.0.1:1/none", connect_timeout=timedelta(seconds=0.2))
    (finding,) = await examine(settings)
    assert (finding.check, finding.level) == ("server", Level.PROBLEM)


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def careless() -> Iterator[Cluster]:
    """A server that is set up badly."""
    with embedded.temporary(
        {
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "autovacuum": "off",
            "default_transaction_isolation": "serializable",
            "wal_level": "logical",
            "max_prepared_transactions": "5",
        }
    ) as cluster:
        yield cluster


@asynccontextmanager
async def at(cluster: Cluster) -> AsyncIterator[tuple[Settings, psycopg.AsyncConnection[Any]]]:
    async with App("tests", database_url=cluster.url) as app:
        await app.session().database.fetch("clock")
    async with await psycopg.AsyncConnection.connect(cluster.url, autocommit=True) as connection:
        yield Settings(database_url=cluster.url, migrate=False, read_only=True), connection


async def test_settings_that_lose_data_or_clear_nothing_away_are_problems(careless: Cluster) -> None:
    async with at(careless) as (settings, _):
        findings = await examine(settings)
    problems = [finding.text for finding in findings if finding.level is Level.PROBLEM]
    assert problems == [
        "fsync is off: after a crash of the machine the database may be lost",
        "full_page_writes is off: after a crash of the machine the database may be lost",
        "synchronous_commit is off: a start that was acknowledged may be lost in a crash",
        "autovacuum is off on this server",
    ]
    (isolation,) = [finding for finding in findings if "isolation" in finding.text]
    assert isolation.level is Level.WARNING


async def test_whoever_holds_vacuum_back_is_named(careless: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.doctor.server._LONG_SECONDS", 0.0)
    monkeypatch.setattr("perdure.doctor.server._MANY_TRANSACTIONS", -1)
    async with at(careless) as (settings, connection):
        await connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")
        await connection.execute("BEGIN; CREATE TABLE mine (id int); PREPARE TRANSACTION 'it''s mine'")
        async with await psycopg.AsyncConnection.connect(careless.url, application_name="psql of jo") as idle:
            await idle.execute("SELECT txid_current()")
            findings = [finding for finding in await examine(settings) if finding.check == "xmin"]
            pid = idle.info.backend_pid
        assert {finding.level for finding in findings} == {Level.WARNING}
        opened, prepared, slot = findings
        assert f"pid {pid} (perdure, psql of jo, idle in transaction)" in opened.text
        assert opened.sql == (f"SELECT pg_terminate_backend({pid})",)
        assert "it's mine" in prepared.text
        assert "replication slot 'slot', used by nobody" in slot.text
        for finding in (prepared, slot):
            for statement in finding.sql:
                await connection.execute(statement.encode())
        assert [each.level for each in await examine(settings) if each.check == "xmin"] == [Level.OK]


async def test_tables_full_of_dead_rows_are_told(careless: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.doctor.server._MANY_DEAD", 1_000)
    monkeypatch.setattr("perdure.doctor.server._LARGE_BYTES", 100_000)
    monkeypatch.setattr("perdure.doctor.server._LARGE_PER_ROW", 10)
    async with at(careless) as (settings, connection):
        async with await psycopg.AsyncConnection.connect(careless.url, autocommit=True) as writing:
            await writing.execute(
                "INSERT INTO perdure.outbox (shard, id, target_id, created_at) "
                "SELECT 1, gen_random_uuid(), gen_random_uuid(), now() FROM generate_series(1, 5000)"
            )
            await writing.execute("DELETE FROM perdure.outbox")
        async with asyncio.timeout(20):  # the server counts a moment later
            while len(findings := [each for each in await examine(settings) if each.check == "bloat"]) < 2:
                pass
        dead, large = findings
        assert dead.text == "table outbox has 5,000 dead rows beside 0 live ones"
        assert "MiB for 0 rows" in large.text
        kept_up = [each for each in await examine(settings) if each.check == "autovacuum"]
        assert any("table outbox was vacuumed never" in finding.text for finding in kept_up)
        for finding in findings:
            for statement in finding.sql:
                await connection.execute(statement.encode())
        async with asyncio.timeout(20):
            while [each.level for each in await examine(settings) if each.check == "bloat"] != [Level.OK]:
                pass


# --- the work --------------------------------------------------------------------------------------------------------


def worker(
    sql: Sql, *, expires: str, status: str = "live", queues: str | None = None, names: str = '["known"]'
) -> None:
    sql(
        "INSERT INTO worker_rows VALUES (1, gen_random_uuid(), %s, 'app', '1', 'host', 1, %s, %s, 100, 10, false, "
        "now(), now(), now() + %s::interval, now(), CASE WHEN %s = 'live' THEN NULL ELSE now() END)",
        status, queues, names, expires, status,
    )  # fmt: skip


async def test_no_worker_is_noted_and_work_without_one_is_a_problem(look: Look, client: Client) -> None:
    assert [(each.level, each.text) for each in await look("workers")] == [(Level.NOTE, "no worker is alive")]
    await client.start(Invocation("unknown"), queue="lonely")
    (queue,), (name,) = await look("queues"), await look("names")
    assert (queue.level, name.level) == (Level.PROBLEM, Level.PROBLEM)
    assert "1 workflow pending in queue 'lonely'" in queue.text
    assert "1 workflow of name 'unknown' wait, and no live worker knows it" in name.text


async def test_queues_are_served_by_those_who_serve_all_or_name_them(look: Look, client: Client, sql: Sql) -> None:
    await client.start(Invocation("known"), queue="eu")
    worker(sql, expires="1 hour", queues='["us"]')
    assert [each.level for each in await look("queues")] == [Level.PROBLEM]
    worker(sql, expires="1 hour", queues='["us", "eu"]')
    assert [each.level for each in await look("queues")] == [Level.OK]
    assert [each.level for each in await look("names")] == [Level.OK]
    sql("UPDATE queue_entries SET enqueued_at = now() - interval '1 hour'")
    (finding,) = await look("queues")
    assert (finding.level, "the oldest for 60 min" in finding.text) == (Level.WARNING, True)
    sql("INSERT INTO queue_rows VALUES (1, 'eu', true, now()) ON CONFLICT (shard, name) DO UPDATE SET paused = true")
    assert [each.level for each in await look("queues")] == [Level.NOTE]


async def test_dead_workers_are_told_and_worse_where_nobody_takes_over(look: Look, client: Client, sql: Sql) -> None:
    worker(sql, expires="1 hour", status="dead")
    assert [each.level for each in await look("workers")] == [Level.WARNING]
    worker(sql, expires="-1 hour")
    await client.start(Invocation("known"))
    sql("UPDATE queue_entries SET worker_id = (SELECT id FROM worker_rows WHERE status = 'live'), epoch = 1")
    assert "no worker is alive to take them over" in (await look("workers"))[0].text
    worker(sql, expires="1 hour")
    assert "died 60 min ago, and no live one took that over" in (await look("workers"))[1].text


async def test_versions_that_nobody_takes_are_told(look: Look, client: Client, sql: Sql) -> None:
    await client.start(Invocation("known"))
    worker(sql, expires="1 hour")
    sql("UPDATE worker_rows SET only_version = true")
    sql("UPDATE queue_entries SET version = 'old'")
    (finding,) = await look("versions")
    assert "1 unfinished workflow of version 'old'" in finding.text


async def test_workflows_that_do_not_move_are_told(look: Look, client: Client, sql: Sql) -> None:
    handles = [await client.start(Invocation("known"), delay=timedelta(hours=1)) for _ in range(3)]
    assert [each.level for each in await look("stuck")] == [Level.OK]
    sql("UPDATE waits SET wake_at = now() - interval '3 hours' WHERE workflow_id = %s", handles[0].id)
    sql("UPDATE waits SET waiting_for = 'operator', wake_at = NULL WHERE workflow_id = %s", handles[1].id)
    sql("DELETE FROM waits WHERE workflow_id = %s", handles[2].id)
    await client.start(Invocation("known"))
    sql("UPDATE queue_entries SET stalls = 4")
    ended = await client.start(Invocation("known"))
    sql(
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at) "
        "VALUES (1, %s, '$result', 'result', 0, 'success', now())",
        ended.id,
    )
    overdue, parked, often, lost, undead = await look("stuck")
    assert "should have woken by now, the first 3 h ago" in overdue.text
    assert f"parked for an operator: known {handles[1].id}" in parked.text
    assert "lost their workers 3 times or more" in often.text
    assert f"are nowhere: known {handles[2].id}" in lost.text
    assert f"have ended, and are pending or waiting all the same: known {ended.id}" in undead.text
    for statement in lost.sql:
        sql(statement)
    await client.handle(ended.id).terminate()
    assert len(await look("stuck")) == 3, "what it says mends it"
    assert (await client.handle(ended.id).status()) == "success"
    levels = [finding.level for finding in (overdue, parked, often, lost, undead)]
    assert levels == [Level.PROBLEM, Level.WARNING, Level.WARNING, Level.PROBLEM, Level.PROBLEM]


@pytest.fixture
async def client(database_url: str, schema: str) -> AsyncIterator[Client]:
    async with Client(database_url, schema=schema) as client:
        yield client


# --- the way ---------------------------------------------------------------------------------------------------------


async def test_rights_that_a_worker_lacks_are_granted_by_what_it_says(
    look: Look, sql: Sql, database_url: str, schema: str
) -> None:
    role = f"worker_{schema}"
    sql(f"CREATE ROLE {role} LOGIN")
    try:
        url = psycopg.conninfo.make_conninfo(database_url, user=role)
        settings = Settings(database_url=url, schema=schema, migrate=False, read_only=True)
        for _ in range(2):  # the schema's, then the tables'
            (finding,) = [each for each in await examine(settings) if each.check in ("schema", "rights") and each.sql]
            assert finding.level is Level.PROBLEM
            for statement in finding.sql:
                sql(statement)
        assert [each.level for each in await examine(settings) if each.check == "rights"] == [Level.OK]
    finally:
        sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_round_trip_that_takes_long_and_a_clock_that_is_off_are_told(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.doctor.way._SLOW_SECONDS", 0.0)
    monkeypatch.setattr("perdure.doctor.way._SKEW_SECONDS", -1.0)
    assert [each.level for each in await look("latency")] == [Level.WARNING]
    assert [each.level for each in await look("clock")] == [Level.WARNING]

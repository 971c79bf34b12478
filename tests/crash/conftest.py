"""A server that tests may stop, restart and kill, listening on TCP as well; and processes that run workers on it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from perdure import App, embedded
from perdure.embedded import Cluster

from .processes import WorkerProcess
from .programs import flows
from .proxy import Proxy

Sql = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with embedded.temporary({"listen_addresses": "127.0.0.1", "port": str(port)}) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The server of the crash tests of this process. It is up when a test begins."""
    _cluster.start(keep=False)
    yield _cluster
    _cluster.start(keep=False)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the bodies of steps note that they began."""
    return tmp_path / "notes"


@pytest.fixture
async def app(database_url: str, schema: str, notes: Path) -> AsyncIterator[App]:
    """The app of the crash tests, as a client: it goes to the server directly; its tables are there."""
    async with flows.build(database_url, schema, notes) as app:
        await app.session().database.fetch("clock")
        async with await psycopg.AsyncConnection.connect(database_url, options=f"-c search_path={schema}") as setup:
            await setup.execute(flows.EFFECTS)
        yield app


@pytest.fixture
def sql(database_url: str, schema: str) -> Sql:
    """Run SQL in the schema of the test, each time on a new connection: it survives restarts."""

    def run(text: str, *params: object) -> list[Any]:
        with psycopg.connect(database_url, autocommit=True, options=f"-c search_path={schema}") as connection:
            cursor = connection.execute(text, params or None)
            return cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """A proxy before the server."""
    with Proxy(cluster.port) as proxy:
        yield proxy


@pytest.fixture
def spawn(database_url: str, schema: str, notes: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start worker processes; whatever the test leaves of them is killed."""
    processes: list[WorkerProcess] = []

    def start(
        *,
        lease: float = 1.0,
        grace: float = 5.0,
        concurrency: int = 50,
        max_recoveries: int = 10,
        statement_timeout: float = 30.0,
    ) -> WorkerProcess:
        process = WorkerProcess(
            url=database_url,
            schema=schema,
            notes=str(notes),
            lease=lease,
            grace=grace,
            concurrency=concurrency,
            max_recoveries=max_recoveries,
            statement_timeout=statement_timeout,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.dispose()


@pytest.fixture
def until(sql: Sql) -> Callable[..., Any]:
    """Wait until a query's first value is true (other processes have no events that we could wait for)."""

    async def wait(text: str, *params: object, timeout: float = 30) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            try:
                rows = await asyncio.to_thread(sql, text, *params)
                if rows and rows[0][0]:
                    return rows[0][0]
            except psycopg.OperationalError:
                pass  # the server is away
            assert time.monotonic() < deadline, f"not within {timeout} s: {text}"
            await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def nothing_lost(sql: Sql, notes: Path) -> Callable[[int, int], None]:
    """Check that so many `ingest` workflows of so many rounds each have ended, with every effect exactly once."""

    def check(workflows: int, rounds: int) -> None:
        assert sql("SELECT status, count(*) FROM workflows GROUP BY status") == [("success", workflows)]
        assert sql("SELECT count(*) FROM queue_entries") == [(0,)]
        wanted = workflows * rounds
        assert sql("SELECT count(*), count(DISTINCT (workflow_id, ordinal)) FROM effects") == [(wanted, wanted)]
        recorded = sql(
            "SELECT count(*), count(DISTINCT (workflow_id, key)) FROM workflow_steps WHERE status = 'success'"
        )
        assert recorded == [(2 * wanted, 2 * wanted)]
        total = rounds * (rounds - 1) // 2
        assert sql("SELECT count(*) FROM workflows WHERE output <> to_jsonb(%s::int)", total) == [(0,)]
        assert {(one["workflow"], one["what"]) for one in flows.noted(notes)} == {
            (str(id), f"{what} {ordinal}")
            for (id,) in sql("SELECT id FROM workflows")
            for what in ("work", "put")
            for ordinal in range(rounds)
        }

    return check

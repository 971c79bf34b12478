"""What tests share: a PostgreSQL of their own, a schema for each test, its clock, and the events that they wait for."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import scratch
from perdure import App, embedded, telemetry
from perdure.config import Settings
from perdure.embedded import Cluster
from perdure.store import database
from perdure.telemetry import Event
from pooler import pooler

_LONG = tuple(f"tests/{name}/" for name in ("simulation", "chaos", "load", "costs", "crash"))


def pytest_configure(config: pytest.Config) -> None:
    folder = scratch.claim()  # the workers of xdist inherit it
    if folder is not None:
        config.add_cleanup(lambda: scratch.release(folder))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first: at the end, one process would work and the others wait."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A server for this test process; tests that stop it make their own (`embedded.temporary`)."""
    given = os.environ.get("PERDURE_TEST_SETTINGS", "")  # tests/servers.py: `name=value`, several with commas
    settings = dict(each.split("=", 1) for each in given.split(",") if each)
    with embedded.temporary({"track_activity_query_size": "16384", **settings}) as cluster:  # tests see what waits
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def through_pooler(request: pytest.FixtureRequest) -> Iterator[None]:
    """With PERDURE_TEST_POOLER set (tests/servers.py), perdure's own connections to the server go through PgBouncer."""
    if not os.environ.get("PERDURE_TEST_POOLER"):
        yield
        return
    direct: str = request.getfixturevalue("cluster").url
    resolve = database._resolve
    with pooler(direct) as through, pytest.MonkeyPatch.context() as patch:
        ends = conninfo_to_dict(through)
        here = conninfo_to_dict(direct)["host"]

        def resolved(settings: Settings) -> str:
            url = resolve(settings)
            is_ours = conninfo_to_dict(url).get("host") == here
            return make_conninfo(url, host=ends["host"], port=ends["port"]) if is_ours else url

        patch.setattr(database, "_resolve", resolved)
        yield


class _Unheard(logging.Handler):
    """What asyncio has to say of errors that nobody asked for."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(scope="session")
def unheard() -> Iterator[list[str]]:
    handler = _Unheard()
    logging.getLogger("asyncio").addHandler(handler)
    yield handler.messages
    logging.getLogger("asyncio").removeHandler(handler)


@pytest.fixture(autouse=True)
def no_error_goes_unheard(unheard: list[str]) -> Iterator[None]:
    """The error of a task that nobody asks for is logged when the task is collected: in this test, or a later one."""
    yield
    messages = unheard.copy()
    unheard.clear()
    assert not messages, "errors that nobody asked for, perhaps of an earlier test:\n" + "\n".join(messages)


@pytest.fixture
def database_url(cluster: Cluster) -> str:
    return cluster.url


@pytest.fixture
def schema() -> str:
    """A schema that no other test uses; it isn't there yet."""
    return f"test_{uuid4().hex[:12]}"


@pytest.fixture
async def app(database_url: str, schema: str) -> AsyncIterator[App]:
    """An app on a schema of its own, without workflows yet."""
    async with App("tests", database_url=database_url, schema=schema) as app:
        yield app


@pytest.fixture
def sql(database_url: str, schema: str) -> Iterator[Callable[..., list[Any]]]:
    """Run SQL in the schema of the test: `sql("SELECT * FROM workflows WHERE id = %s", id)`."""
    with psycopg.connect(database_url, autocommit=True, options=f"-c search_path={schema}") as connection:

        def run(text: str, *params: object) -> list[Any]:
            cursor = connection.execute(text, params or None)
            return cursor.fetchall() if cursor.description else []

        yield run


class Events:
    """The events since the test began; `await events.wait_for(...)` waits for the next that fits."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self._waiters: list[tuple[Callable[[Event], bool], asyncio.Future[Event], asyncio.AbstractEventLoop]] = []

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        for fits, future, loop in list(self._waiters):
            if fits(event):
                loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(event))

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]

    async def wait_for(
        self, kind: type[Event], fits: Callable[[Any], bool] = lambda _: True, *, timeout: float = 30
    ) -> Any:
        """The first event of that kind that fits, past or to come."""

        def both(event: Event) -> bool:
            return isinstance(event, kind) and fits(event)

        loop = asyncio.get_running_loop()
        future: asyncio.Future[Event] = loop.create_future()
        waiter = (both, future, loop)
        self._waiters.append(waiter)
        try:
            for event in list(self.seen):
                if both(event):
                    return event
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._waiters.remove(waiter)


@pytest.fixture
def events() -> Iterator[Events]:
    collected = Events()
    unsubscribe = telemetry.subscribe(collected)
    yield collected
    unsubscribe()


class Clock:
    """The database's clock, in the schema of the test: it goes on as usual, and can be put forward."""

    def __init__(self, sql: Callable[..., list[Any]], schema: str) -> None:
        self._sql = sql
        self._schema = schema

    def install(self) -> None:
        """Replace `now()`; the schema must be there."""
        self._sql("CREATE TABLE IF NOT EXISTS test_clock (shift interval NOT NULL)")
        self._sql("INSERT INTO test_clock VALUES (interval '0')")
        self._sql(
            f"CREATE OR REPLACE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE AS "
            f"'SELECT pg_catalog.statement_timestamp() + (SELECT shift FROM \"{self._schema}\".test_clock)'"
        )

    def advance(self, seconds: float) -> None:
        self._sql("UPDATE test_clock SET shift = shift + make_interval(secs => %s)", seconds)


@pytest.fixture
async def clock(app: App, sql: Callable[..., list[Any]], schema: str) -> Clock:
    await app.session().database.fetch("clock")
    clock = Clock(sql, schema)
    clock.install()
    return clock

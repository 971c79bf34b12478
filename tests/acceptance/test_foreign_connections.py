"""A start through a caller's own connection, of any library: it lives and dies with the caller's transaction."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from engine.support import until
from perdure import App, Start, WrongPlace


@pytest.fixture
def parts(database_url: str) -> dict[str, str]:
    """The URL of the server in pieces, for libraries with ways of their own."""
    split = urlsplit(database_url)
    query = parse_qs(split.query)
    return {
        "host": query["host"][0],
        "port": query["port"][0],
        "user": query["user"][0],
        "database": split.path.lstrip("/"),
    }


def declare(app: App) -> Callable[[int], Any]:
    @app.workflow
    async def noted(number: int) -> int:
        return number

    return noted


def started(sql: Callable[..., list[Any]]) -> list[str]:
    return [key for (key,) in sql("SELECT key FROM workflows ORDER BY key")]


async def test_asyncpg(app: App, parts: dict[str, str], sql: Callable[..., list[Any]]) -> None:
    import asyncpg

    noted = declare(app)
    connection = await asyncpg.connect(**{**parts, "port": int(parts["port"])})
    try:
        async with connection.transaction():
            await app.start(noted(1), key="kept", connection=connection)
        transaction = connection.transaction()
        await transaction.start()
        await app.start(noted(2), key="gone", connection=connection)
        await app.start(noted(3), connection=connection)
        await transaction.rollback()
    finally:
        await connection.close()
    assert started(sql) == ["kept"]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("kind", ["connection", "session"])
async def test_sqlalchemy_with_asyncio(
    app: App, parts: dict[str, str], sql: Callable[..., list[Any]], driver: str, kind: str
) -> None:
    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    noted = declare(app)
    url = URL.create(
        f"postgresql+{driver}",
        username=parts["user"],
        database=parts["database"],
        query={"host": parts["host"], "port": parts["port"]},
    )
    engine = create_async_engine(url)
    try:
        for key, keep in (("kept", True), ("gone", False)):
            opened: Any = engine.connect() if kind == "connection" else AsyncSession(engine)
            async with opened as connection:
                await app.start(noted(1), key=key, connection=connection)
                await (connection.commit() if keep else connection.rollback())
    finally:
        await engine.dispose()
    assert started(sql) == ["kept"]


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_sqlalchemy_without(app: App, parts: dict[str, str], sql: Callable[..., list[Any]], kind: str) -> None:
    from sqlalchemy import URL, create_engine
    from sqlalchemy.orm import Session

    noted = declare(app)
    url = URL.create(
        "postgresql+psycopg",
        username=parts["user"],
        database=parts["database"],
        query={"host": parts["host"], "port": parts["port"]},
    )
    engine = create_engine(url)
    for key, keep in (("kept", True), ("gone", False)):
        with engine.connect() if kind == "connection" else Session(engine) as connection:
            app.blocking.start(noted(1), key=key, connection=connection)
            if keep:
                connection.commit()
            else:
                connection.rollback()
    engine.dispose()
    app.blocking.close()
    assert started(sql) == ["kept"]


def test_django(app: App, parts: dict[str, str], sql: Callable[..., list[Any]]) -> None:
    from django.conf import settings
    from django.db.backends.postgresql.base import DatabaseWrapper

    if not settings.configured:
        settings.configure()
    noted = declare(app)
    connection = DatabaseWrapper(
        {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts["database"],
            "USER": parts["user"],
            "PASSWORD": "",
            "HOST": parts["host"],
            "PORT": parts["port"],
            "OPTIONS": {},
            "TIME_ZONE": None,
            "CONN_MAX_AGE": 0,
            "CONN_HEALTH_CHECKS": False,
            "AUTOCOMMIT": True,
            "ATOMIC_REQUESTS": False,
            "DISABLE_SERVER_SIDE_CURSORS": False,
            "TEST": {},
        }
    )
    connection.set_autocommit(False)
    app.blocking.start(noted(1), key="kept", connection=connection)
    connection.commit()
    app.blocking.start(noted(2), key="gone", connection=connection)
    connection.rollback()
    many = app.blocking.start_many([Start(noted(3), key="many"), Start(noted(4), key="more")], connection=connection)
    connection.commit()
    connection.close()
    app.blocking.close()
    assert [handle.key for handle in many] == ["many", "more"]
    assert started(sql) == ["kept", "many", "more"]


def test_who_waits_for_a_transaction_of_another_thread_holds_up_no_other(
    app: App, database_url: str, sql: Callable[..., list[Any]]
) -> None:
    """Else the other could never end its transaction."""
    noted = declare(app)

    def second() -> list[Any]:
        with psycopg.connect(database_url, application_name="second") as connection:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # else who waited is told to begin anew
            return app.blocking.start_many([Start(noted(2), key="shared")], connection=connection)

    with psycopg.connect(database_url) as connection, ThreadPoolExecutor() as pool:
        first = app.blocking.start(noted(1), key="shared", connection=connection)
        attached = pool.submit(second)
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE application_name = 'second'"
        asyncio.run(until(sql, waits))
        app.blocking.start(noted(3), key="another")
        assert not attached.done()
        connection.commit()
        assert [handle.id for handle in attached.result(30)] == [first.id]
    app.blocking.close()


async def test_anything_else_is_refused(app: App) -> None:
    noted = declare(app)
    with pytest.raises(WrongPlace, match="psycopg 3, asyncpg, SQLAlchemy or Django"):
        await app.start(noted(1), connection=sys.stdout)

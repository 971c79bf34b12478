"""The parts of a worker, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest

from perdure import App, Client
from perdure.config import Settings
from perdure.engine.writer import Writer

from .support import FaultyDatabase, LeaseDatabases, register


@pytest.fixture
async def database(database_url: str, schema: str) -> AsyncIterator[FaultyDatabase]:
    """A database whose answers can be lost; the schema is there."""
    database = FaultyDatabase(Settings(database_url=database_url, schema=schema), pool_size=8)
    await database.attempt("clock")
    yield database
    await database.close()


@pytest.fixture
async def me(database: FaultyDatabase) -> UUID:
    """A worker that is alive."""
    return await register(database)


@pytest.fixture
async def writer(database: FaultyDatabase) -> AsyncIterator[Writer]:
    """A writer at work; whatever it fails with fails the test."""
    writer = Writer(database, "1")
    task = asyncio.create_task(writer.run())
    yield writer
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def checkpoints(sql: Callable[..., list[Any]]) -> Callable[[UUID], list[tuple[Any, ...]]]:
    """(key, worker_id, epoch, payload) of what a workflow has recorded."""

    def of(id: UUID) -> list[tuple[Any, ...]]:
        return sql(
            "SELECT key, worker_id, epoch, payload::text FROM checkpoints "
            "WHERE workflow_id = %s AND kind <> 'input' ORDER BY position, key",
            id,
        )

    return of


@pytest.fixture
async def app(database_url: str, schema: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    """An app whose database (that of its session: `faulty`) loses answers on demand; the schema is there."""
    monkeypatch.setattr("perdure.session.Database", FaultyDatabase)
    async with App("tests", database_url=database_url, schema=schema) as app:
        await app.session().database.fetch("clock")
        yield app


@pytest.fixture
async def faulty(app: App) -> FaultyDatabase:
    """The database of the app and its worker; the lease has its own."""
    database = app.session().database
    assert isinstance(database, FaultyDatabase)
    return database


@pytest.fixture
async def client(app: App, database_url: str, schema: str) -> AsyncIterator[Client]:
    """Somebody else, who starts workflows without a worker at hand: they are claimed from the queue."""
    async with Client(database_url, schema=schema) as client:
        yield client


@pytest.fixture
def lease_databases(monkeypatch: pytest.MonkeyPatch) -> LeaseDatabases:
    databases = LeaseDatabases()
    monkeypatch.setattr("perdure.engine.leases.Database", databases.make)
    return databases

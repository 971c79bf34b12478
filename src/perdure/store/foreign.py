"""Programs on a caller's own connection: the start commits or rolls back with the caller's transaction.

Taken are psycopg 3 and asyncpg connections, and whatever wraps one: SQLAlchemy's connections and sessions, Django's
`connection`. Nothing here commits, and nothing of the session is changed.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, RawCursor
from psycopg.rows import namedtuple_row

from perdure.errors import WrongPlace
from perdure.store import arrays
from perdure.store.arrays import Array
from perdure.store.programs import Program
from perdure.store.statements import Statements

T = TypeVar("T")

# SQLAlchemy begins a transaction at the first statement that it sees; what it doesn't know of, it doesn't commit.
_BEGIN = "SELECT 1"
_PSYCOPG = (psycopg.Connection, AsyncConnection)


async def run_async(connection: Any, program: Program[T], statements: Statements) -> T:
    """Run a program on a connection, whatever its kind; a synchronous one blocks meanwhile."""
    raw = await _unwrap_async(connection)
    if isinstance(raw, psycopg.Connection):
        return run_blocking(raw, program, statements)
    try:
        name, params = next(program)
        while True:
            name, params = program.send(await _fetch_async(raw, statements[name].text, params))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def run_blocking(connection: Any, program: Program[T], statements: Statements) -> T:
    """Run a program on a synchronous connection."""
    raw: Any = _unwrap(connection)
    if not _is_blocking(raw):
        raise _unknown(connection)
    try:
        name, params = next(program)
        while True:
            with RawCursor(raw, row_factory=namedtuple_row) as cursor:
                arrays.register(cursor.adapters)
                cursor.execute(statements[name].text, params)
                rows = cursor.fetchall() if cursor.description else []
            name, params = program.send(rows)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _fetch_async(connection: Any, text: bytes, params: Any) -> Any:
    if _is_async(connection):
        async with AsyncRawCursor(connection, row_factory=namedtuple_row) as cursor:
            arrays.register(cursor.adapters)
            await cursor.execute(text, params)
            return await cursor.fetchall() if cursor.description else []
    plain = [list(value) if isinstance(value, Array) else value for value in params]
    return [_Record(row) for row in await connection.fetch(text.decode(), *plain)]


class _Record:
    """asyncpg's record, read by attribute as psycopg's rows are."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def __getattr__(self, name: str) -> Any:
        try:
            return self._record[name]
        except KeyError:
            raise AttributeError(name) from None


async def _unwrap_async(connection: Any) -> Any:
    """The driver's connection inside what SQLAlchemy's asyncio gives; else as `_unwrap`."""
    module = type(connection).__module__
    if module.startswith("sqlalchemy.ext.asyncio"):
        if hasattr(connection, "get_bind"):  # a session
            connection = await connection.connection()
        await connection.exec_driver_sql(_BEGIN)
        raw = await connection.get_raw_connection()
        return _unwrap(raw.driver_connection)
    return _unwrap(connection)


def _unwrap(connection: Any) -> Any:
    """The driver's connection: psycopg's, or asyncpg's."""
    module = type(connection).__module__
    if isinstance(connection, _PSYCOPG) or module.startswith("asyncpg"):
        return cast("Any", connection)
    if module.startswith("sqlalchemy."):
        if module.startswith("sqlalchemy.orm"):  # a session
            connection = connection.connection()
        connection.exec_driver_sql(_BEGIN)
        return _unwrap(connection.connection.driver_connection)
    if module.startswith("django."):
        connection.ensure_connection()
        return _unwrap(connection.connection)
    raise _unknown(connection)


def _is_blocking(connection: object) -> bool:
    return isinstance(connection, psycopg.Connection)


def _is_async(connection: object) -> bool:
    return isinstance(connection, AsyncConnection)


def _unknown(connection: Any) -> WrongPlace:
    return WrongPlace(
        f"connection= takes a connection of psycopg 3, asyncpg, SQLAlchemy or Django, "
        f"not {type(connection).__module__}.{type(connection).__qualname__}"
    )

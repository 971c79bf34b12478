"""Where a test runs: a schema of its own, on the embedded server or on one that is named for tests.

`PERDURE_DATABASE_URL` isn't asked: it may name a database that matters.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from uuid import uuid4

import psycopg
from psycopg import sql

from perdure import embedded

DATABASE_URL = "PERDURE_TEST_DATABASE_URL"
_PREFIX = "perdure_test_"
_NAME = re.compile(rf"{_PREFIX}([0-9a-f]{{8}})_[0-9a-f]{{10}}")
_LOCK_TIMEOUT = "5s"
_FORGOTTEN_SECONDS = 86_400
_swept: set[str] = set()


def server_url() -> str:
    """The server for tests: `PERDURE_TEST_DATABASE_URL`, else the project's embedded one, which is up then."""
    return os.environ.get(DATABASE_URL) or embedded.embedded_url()


def new_schema() -> str:
    """A name that no other test has; it says when it was made."""
    return f"{_PREFIX}{int(time.time()):x}_{uuid4().hex[:10]}"


async def drop(url: str, schema: str) -> None:
    """Delete a test's schema, with all that is in it.

    Raises:
        TimeoutError: Somebody has a transaction open that uses it.
    """
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(sql.SQL("SET lock_timeout = {}").format(sql.Literal(_LOCK_TIMEOUT)))
        try:
            await connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
        except psycopg.errors.LockNotAvailable as error:
            raise TimeoutError(
                f"the test's schema {schema!r} can't be deleted, because a transaction that uses it is still open; "
                "end it within the block"
            ) from error


async def sweep(url: str) -> None:
    """Delete what tests that were killed have left behind, a day ago or more; once a process and server."""
    if url in _swept:
        return
    _swept.add(url)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT nspname FROM pg_catalog.pg_namespace WHERE nspname LIKE 'perdure\\_test\\_%'"
        )
        for (schema,) in await cursor.fetchall():
            made = _NAME.fullmatch(schema)
            if made is not None and time.time() - int(made[1], 16) > _FORGOTTEN_SECONDS:
                with suppress(TimeoutError, psycopg.Error):  # somebody else's, or swept at this moment
                    await drop(url, schema)

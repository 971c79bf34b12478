"""What is wrong with an installation, or will be: `perdure doctor`.

Each check is one look at the database, and changes nothing (what one of them makes, to compare with, is rolled back). A
check that fails is a finding of its own; the others go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import psycopg

from perdure.config import Settings
from perdure.doctor import drift, server, way, work
from perdure.doctor.findings import Finding, Level, note, problem
from perdure.doctor.look import Look
from perdure.errors import ConfigurationError, DatabaseUnavailable, PerdureError
from perdure.store.database import Connection, Database, Interrupted

__all__ = ["Finding", "Level", "examine"]

_FIRST = (way.server, way.speed, way.pooler, way.hints)
_NEEDED = (way.usage, drift.exists)
_THEN = (
    drift.schema,
    way.rights,
    server.pinned,
    server.bloat,
    server.autovacuum,
    work.workers,
    work.queues,
    work.names,
    work.stuck,
)


async def examine(settings: Settings) -> list[Finding]:
    """All that is found, in the order in which one would want to know it."""
    database = Database(settings, ensure=_as_it_is, pool_size=2)
    try:
        await database.persist(lambda: _reached(database))
    except (ConfigurationError, DatabaseUnavailable) as error:
        advice = "see to the server, the URL (--database-url, PERDURE_DATABASE_URL), and the way between them"
        return [problem("server", str(error), advice)]
    try:
        async with database.connection() as connection:
            look = Look(database, connection)
            findings = await _all(look, _FIRST)
            lacking = await _all(look, _NEEDED)
            return [*findings, *(lacking or await _all(look, _THEN))]
    finally:
        await database.close()


async def _all(look: Look, checks: Sequence[Callable[[Look], Awaitable[Sequence[Finding]]]]) -> list[Finding]:
    return [finding for check in checks for finding in await _checked(look, check)]


async def _checked(look: Look, check: Callable[[Look], Awaitable[Sequence[Finding]]]) -> Sequence[Finding]:
    name = check.__name__
    try:
        return await check(look)
    except psycopg.errors.InsufficientPrivilege as error:
        return [note(name, f"it couldn't be looked at: {_line(error)}", "run this as the owner of the schema")]
    except (psycopg.Error, Interrupted, PerdureError) as error:
        return [
            problem(name, f"it couldn't be looked at: {_line(error)}", "mend what was found before, then look again")
        ]


async def _reached(database: Database) -> None:
    async with database.connection():
        pass


async def _as_it_is(connection: Connection, schema: str, *, apply: bool) -> None:
    """The schema is looked at, not brought up to date."""


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

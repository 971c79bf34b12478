"""Where the demo plays: the files of the standard library, and a schema that nobody else uses."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import psycopg

from perdure.errors import ConfigurationError

SCHEMA = "perdure_demo"
LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()

Connection = psycopg.Connection[tuple[Any, ...]]

# Neither what others have installed there, nor the tests of Python itself, which are as large again.
_NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test")
_MARK = "made by `perdure demo`, which drops it when it runs again"


def source_files() -> list[str]:
    """The source files of the running Python's standard library, as paths below its folder.

    Raises:
        ConfigurationError: There are none: this Python carries its library as bytecode, or in an archive.
    """
    paths = (path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    found = sorted(str(path) for path in paths if path.parts[0] not in _NOT_THE_LIBRARY)
    if not found:
        raise ConfigurationError(f"no source files in {str(LIBRARY)!r}; run the demo with a Python that has them")
    return found


def connect(url: str) -> Connection:
    """A connection for looking on.

    Raises:
        ConfigurationError: The database can't be reached with that URL.
    """
    try:
        return psycopg.connect(url, autocommit=True)
    except psycopg.Error as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"{reason}; check --database-url or PERDURE_DATABASE_URL") from None


def set_up(connection: Connection) -> None:
    """Make the schema and the table of results anew. The table has no constraint that would reject a second row.

    Raises:
        ConfigurationError: The schema is somebody else's, a demo is running in it, or rights are missing.
    """
    _check(connection)
    try:
        with connection.transaction():
            connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
            connection.execute(f"CREATE SCHEMA {SCHEMA}")
            connection.execute(f"COMMENT ON SCHEMA {SCHEMA} IS '{_MARK}'")
            connection.execute(
                f"""
                CREATE TABLE {SCHEMA}.results (
                    ordinal int4 NOT NULL,
                    path text NOT NULL,
                    workflow_id uuid NOT NULL,
                    attempt int8 NOT NULL,
                    process int4 NOT NULL,
                    definitions int4,
                    tokens int4,
                    problem text,
                    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
                )
                """
            )
    except psycopg.errors.InsufficientPrivilege as error:
        raise ConfigurationError(
            f"{error.diag.message_primary}; the demo makes a schema {SCHEMA!r} of its own: use a role that may"
        ) from None


def tear_down(connection: Connection) -> None:
    """Leave nothing behind."""
    connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


def _check(connection: Connection) -> None:
    """Nothing is dropped but what a demo has made, and no demo is running in."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = %s", [SCHEMA]
    ).fetchone()
    if row is None:
        return
    if row[0] != _MARK:
        raise ConfigurationError(
            f"schema {SCHEMA!r} is there, and no demo has made it; rename or drop it, or use another database"
        )
    try:
        live = connection.execute(f"SELECT pid FROM {SCHEMA}.workers WHERE status = 'live'").fetchall()
    except psycopg.errors.UndefinedTable:
        return
    if live:
        processes = ", ".join(str(pid) for (pid,) in live)
        raise ConfigurationError(
            f"another demo is running in this database (processes {processes}); wait until it has ended"
        )

"""`perdure migrate`: the schema in the database."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import click

from perdure.cli.endings import FAILED
from perdure.cli.options import database_options, settings
from perdure.config import Settings
from perdure.store import migrations
from perdure.store.database import Connection, Database
from perdure.store.migrations import Migration


@click.command()
@click.option("--print", "print_it", is_flag=True, help="Print the SQL that makes the schema, and connect to nothing.")
@click.option("--dry-run", is_flag=True, help="Only say what is missing. Exit code 1: something is.")
@database_options
def migrate(print_it: bool, dry_run: bool) -> None:
    """Make the schema in the database, or bring it up to date. Does nothing if it is.

    Workers and clients do the same at their first connection, unless PERDURE_MIGRATE=off. What is missing is applied in
    one transaction, by one process at a time; workers may go on meanwhile.

    \b
    Examples:
      perdure migrate
      perdure migrate --dry-run
      perdure migrate --print | psql "$PERDURE_DATABASE_URL"
    """
    if print_it and dry_run:
        raise click.UsageError("--print and --dry-run exclude each other")
    chosen = settings(migrate=not dry_run)
    if print_it:
        click.echo(migrations.script(chosen.schema), nl=False)
        return
    found = asyncio.run(_bring_up_to_date(chosen))
    if not found:
        newest = migrations.known()[-1]
        click.echo(f"schema {chosen.schema!r} is up to date ({_name(newest)})")
        return
    names = ", ".join(map(_name, found))
    click.echo(f"schema {chosen.schema!r} lacks {names}" if dry_run else f"schema {chosen.schema!r}: applied {names}")
    if dry_run:
        sys.exit(FAILED)


async def _bring_up_to_date(settings: Settings) -> Sequence[Migration]:
    """What was missing; it is applied if the settings allow it."""
    found: tuple[Migration, ...] = ()

    async def ensure(connection: Connection, schema: str, *, apply: bool) -> None:
        nonlocal found
        found = await (migrations.ensure(connection, schema, apply=True) if apply else _pending(connection, schema))

    await connect(Database(settings, ensure=ensure))
    return found


async def connect(database: Database) -> str:
    """Make the first connection, with what is done at that; returns which server it is. Closes the database."""

    async def once() -> str:
        async with database.connection() as connection:
            info = connection.info
            version = info.parameter_status("server_version") or "?"
            return f"PostgreSQL {version}, {info.user}@{info.host}:{info.port}/{info.dbname}"

    try:
        return await database.persist(once)
    finally:
        await database.close()


async def _pending(connection: Connection, schema: str) -> tuple[Migration, ...]:
    return await migrations.pending(connection, schema)


def _name(migration: Migration) -> str:
    return f"{migration.version:04d}_{migration.name}"

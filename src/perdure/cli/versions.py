"""`perdure versions`: which versions of the code unfinished workflows belong to, and who goes on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from perdure.cli.clients import with_client
from perdure.cli.options import database_options
from perdure.cli.tables import Column, print_array, show
from perdure.client import Client
from perdure.store.statements import Statement, in_schema

_QUERY = """
SELECT version, pending, running, waiting, workers
FROM perdure.versions
ORDER BY version NULLS FIRST
"""
_COLUMNS = ("version", "pending", "running", "waiting", "workers")


@click.command()
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array.")
@database_options
def versions(json_wanted: bool) -> None:
    """List the versions of unfinished workflows, and who runs them.

    A worker takes workflows of all versions, unless it was started with --only-version. A version without workers goes
    on when one of that version is started, or one without --only-version.

    \b
    Examples:
      perdure versions
      perdure versions --json | jq '.[] | select(.workers == 0)'
    """
    found = with_client(_read, migrate=False)
    if json_wanted:
        print_array({name: getattr(row, name) for name in _COLUMNS} for row in found)
        return
    show([Column("version", whole=True), *map(Column, (*_COLUMNS[1:], "note"))], [_cells(row) for row in found])


async def _read(client: Client) -> Sequence[Any]:
    """The view's rows."""
    database = client.session().database
    statement = Statement(name="versions", text=in_schema(_QUERY, client.settings.schema).encode())

    async def once() -> Sequence[Any]:
        async with database.connection() as connection:
            return await database.execute(connection, statement, ())

    return await database.persist(once)


def _cells(row: Any) -> list[str]:
    note = "" if row.workers else "NO LIVE WORKER takes it; start one of that version, or one without --only-version"
    return [row.version or "(none yet)", *(str(getattr(row, name)) for name in _COLUMNS[1:]), note]

"""`perdure version`: what works together here."""

from __future__ import annotations

import asyncio
import json
import platform
from dataclasses import replace

import click
import psycopg

import perdure
from perdure.cli.migrate import connect
from perdure.cli.options import database_options, settings
from perdure.config import Settings
from perdure.errors import SchemaError
from perdure.store import migrations
from perdure.store.database import Connection, Database


@click.command()
@click.option("--server", is_flag=True, help="Ask the server for its version and its schema, too.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@database_options
def version(server: bool, as_json: bool) -> None:
    """Say which versions work together here.

    \b
    Examples:
      perdure version
      perdure version --server --json
    """
    newest = migrations.known()[-1]
    found = {
        "perdure": perdure.__version__,
        "python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__}, libpq {_libpq(psycopg.pq.version())})",
        "migration": f"{newest.version:04d}_{newest.name}",
    }
    if server:
        found |= asyncio.run(_ask(settings(migrate=False)))
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<10} {value}")


async def _ask(settings: Settings) -> dict[str, str]:
    state = ""

    async def ensure(connection: Connection, schema: str, *, apply: bool) -> None:
        nonlocal state
        try:
            missing = await migrations.pending(connection, schema)
        except SchemaError as error:
            state = str(error)
        else:
            state = f"{schema!r} lacks {len(missing)} migrations" if missing else f"{schema!r} is up to date"

    where = await connect(Database(replace(settings, pool_size=1), ensure=ensure))
    return {"server": where, "schema": state}


def _libpq(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"

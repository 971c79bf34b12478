"""`perdure postgres`: the embedded PostgreSQL of the project, by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from types import FrameType

import click

from perdure.embedded import Status, locate, psql_path
from perdure.errors import ConfigurationError

NOT_RUNNING = 3


@click.group()
def postgres() -> None:
    """The PostgreSQL that perdure starts itself, where PERDURE_DATABASE_URL isn't set.

    There is one for each project: the nearest folder upwards with pyproject.toml or .git. It starts with the first
    process that needs it and stops with the last one; its data is kept.

    \b
    Examples:
      perdure postgres start                       keep it running
      perdure postgres psql -c 'SELECT * FROM perdure.workflows'
      pg_dump "$(perdure postgres url --start)" > dump.sql
      perdure postgres status --json
      perdure postgres stop
    """


@postgres.command()
def start() -> None:
    """Start the server, and keep it running until `perdure postgres stop`.

    \b
    Example:
      perdure postgres start
    """
    cluster = locate()
    cluster.start(keep=True)
    click.echo(_sentence(cluster.status()))
    if os.environ.get("PERDURE_DATABASE_URL"):
        click.echo("note: PERDURE_DATABASE_URL is set, so perdure itself uses that one", err=True)


@postgres.command()
def stop() -> None:
    """Stop the server, whoever uses it. The data is kept.

    \b
    Example:
      perdure postgres stop
    """
    cluster = locate()
    stopped = cluster.stop()
    click.echo(f"stopped: {cluster.directory}" if stopped else f"was not running: {cluster.directory}")


@postgres.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Say whether the server runs. Exit code 0: it does; 3: it doesn't.

    \b
    Examples:
      perdure postgres status
      perdure postgres status --json
    """
    found = locate().status()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "running": found.running,
                    "kept": found.kept,
                    "directory": str(found.directory),
                    "url": found.url,
                    "version": found.version,
                    "pid": found.pid,
                    "connections": found.connections,
                }
            )
        )
    else:
        click.echo(_sentence(found))
    if not found.running:
        sys.exit(NOT_RUNNING)


@postgres.command()
@click.option("--start", "start_it", is_flag=True, help="Start the server first, as `perdure postgres start` does.")
def url(start_it: bool) -> None:
    """Print the URL of the database, for other programs. Exit code 3: nothing answers there now.

    \b
    Examples:
      export PERDURE_DATABASE_URL="$(perdure postgres url --start)"
      pg_dump "$(perdure postgres url)"
    """
    cluster = locate()
    if start_it:
        click.echo(cluster.start(keep=True))
        return
    click.echo(cluster.url)
    if not cluster.status().running:
        click.echo("the server isn't running; `perdure postgres start` or `url --start` starts it", err=True)
        sys.exit(NOT_RUNNING)


@postgres.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the database. Starts the server if need be; ARGUMENTS go to psql.

    \b
    Examples:
      perdure postgres psql
      perdure postgres psql -c 'SELECT * FROM perdure.workflows'
      perdure postgres psql -X -At -f report.sql
    """
    program = _psql()
    # Not exec: this process is the user of the server, and stops it afterwards if it was the last one.
    with locate() as cluster:
        code = _run_in_foreground([program, cluster.url, *arguments])
    sys.exit(code)


def _sentence(found: Status) -> str:
    if not found.running:
        kept = " (to be kept when it runs)" if found.kept else ""
        return f"not running{kept}: {found.directory}"
    stays = "kept until `perdure postgres stop`" if found.kept else "until its last user leaves"
    clients = f"{found.connections} client{'' if found.connections == 1 else 's'}"
    return f"running, {stays}: PostgreSQL {found.version} at {found.directory}, {clients}\n{found.url}"


def _psql() -> str:
    """The embedded psql, else the system's."""
    try:
        bundled = psql_path()
    except ConfigurationError:
        if (program := shutil.which("psql")) is None:
            raise
        return program
    return str(bundled) if bundled.exists() else shutil.which("psql") or str(bundled)


def _run_in_foreground(command: list[str]) -> int:
    # Ctrl-C goes to both; psql takes it for "cancel the query". A handler, since SIG_IGN would be inherited.
    before = signal.signal(signal.SIGINT, _leave_it_to_the_child)
    try:
        code = subprocess.run(command).returncode
        return code if code >= 0 else 128 - code  # as a shell puts it
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_it_to_the_child(number: int, frame: FrameType | None) -> None:
    pass

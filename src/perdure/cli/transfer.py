"""`perdure workflow export` and `import`: a workflow as JSON, out of one database and into another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import click

from perdure.cli.clients import with_client
from perdure.cli.endings import MISCONFIGURED, Failure
from perdure.cli.options import database_options, on_terminal, parsed
from perdure.cli.tables import as_json
from perdure.client import Client
from perdure.errors import KeyConflict, SerializationError, WorkflowNotFound
from perdure.model.statuses import Status


@click.command("export")
@click.argument("id", type=click.UUID)
@click.option(
    "--output", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE", help="Where to. [default: stdout]"
)
@database_options
def export(id: UUID, output: str | None) -> None:
    """Write a workflow as JSON, with all that it recorded.

    For a bug report, a test, another database. Payloads stand in it as they are stored: have a look before you send it
    to anybody.

    \b
    Examples:
      perdure workflow export 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --output stuck.json
      perdure workflow export 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 | perdure workflow --schema other import -
    """
    exported = with_client(lambda client: client.export(id), migrate=False)
    # Half a surrogate pair has no UTF-8; in JSON it has an escape, which happens to be Python's.
    text = f"{as_json(exported, indent=2)}\n".encode("utf-8", "backslashreplace")
    if output in (None, "-"):
        click.echo(text, nl=False)
        return
    try:
        Path(output).write_bytes(text)
    except OSError as error:
        raise Failure(f"can't write {output!r}: {error.strerror}") from error


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="[FILE]", required=False)
@database_options
def import_(file: str | None) -> None:
    """Bring in a workflow that was exported.

    Reads what `perdure workflow export` wrote, from FILE or from stdin (-), and prints the workflow's id. What hadn't
    ended waits for an operator here, because it may still run where it came from: `perdure workflow resume` lets it go
    on.

    \b
    Examples:
      perdure workflow import stuck.json
      perdure workflow import - < stuck.json
    """
    if file is None and on_terminal(sys.stdin):
        raise click.UsageError("give a FILE, or - to type it in")
    exported = _read(file or "-")
    status, id = with_client(lambda client: _import(client, exported))
    click.echo(str(id))
    if not status.is_final:
        click.echo(f"note: it waits for an operator; 'perdure workflow resume {id}' lets it go on", err=True)


async def _import(client: Client, exported: dict[str, Any]) -> tuple[Status, UUID]:
    try:
        handle = await client.import_(exported)
    except SerializationError as error:
        raise Failure(str(error), MISCONFIGURED) from error
    except KeyConflict as conflict:
        raise Failure(await _told(client, conflict)) from conflict
    return await handle.status(), handle.id


async def _told(client: Client, conflict: KeyConflict) -> str:
    """Which of the two it is: the workflow itself is there, or another one under its key."""
    id = conflict.workflow_id
    try:
        await client.handle(id).status()
    except WorkflowNotFound:
        holder = await client.find(conflict.name, key=conflict.key)
        held = f"key {conflict.key!r} of workflow {conflict.name!r} is held by {holder.id if holder else 'another one'}"
        return f"{held}; nothing is imported"
    return f"workflow {id} is there already; nothing is imported"


def _read(file: str) -> dict[str, Any]:
    try:
        exported = parsed(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"is no JSON: {error}") from None
    except OSError as error:
        raise _bad(file, f"can't be read: {error.strerror}") from None
    if not isinstance(exported, dict) or "perdure" not in exported:
        raise _bad(file, "holds no workflow; give what 'perdure workflow export' wrote")
    return cast("dict[str, Any]", exported)


def _bad(file: str, reason: str) -> click.BadParameter:
    return click.BadParameter(f"{'stdin' if file == '-' else repr(file)} {reason}", param_hint="FILE")

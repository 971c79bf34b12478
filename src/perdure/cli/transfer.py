"""`perdure workflow export` and `import`: workflows as JSON, out of one database and into another.

One workflow is one JSON object, for people; many are JSON lines, one each.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast
from uuid import UUID

import click

from perdure import transfer
from perdure.cli.clients import with_client
from perdure.cli.endings import FAILED, MISCONFIGURED, Failure
from perdure.cli.options import database_options, on_terminal, parsed
from perdure.cli.orders import Order, check_which, counted, ordering
from perdure.cli.tables import Column, as_json, print_array, show
from perdure.client import Client
from perdure.errors import KeyConflict, PerdureError, SerializationError, WorkflowNotFound
from perdure.model.statuses import Status

# --- export -----------------------------------------------------------------------------------------------------------


@click.command("export")
@ordering(
    tuple(Status),
    "Only those that stand there.",
    "All of them; goes with no filter.",
    done_help="For programs: with --output or --dry-run, one array of what was done.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE", help="Where to. [default: stdout]"
)
def export(order: Order, output: str | None) -> None:
    """Write workflows as JSON, with all that they recorded.

    For a bug report, a test, another database. Give ids or a filter: one id gives one JSON object, anything else JSON
    lines, a workflow each. Payloads stand in it as they are stored: have a look before you send it to anybody.

    \b
    Examples:
      perdure workflow export 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --output stuck.json
      perdure workflow export --status error --since 1d --output failed.jsonl
      perdure workflow export 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 | perdure workflow --schema other import -
    """
    check_which(order)
    to_stdout = output in (None, "-")
    if order.json_wanted and to_stdout and not order.dry_run:
        raise click.UsageError("--json goes with --output or --dry-run: what goes to stdout is JSON already")
    outcomes = with_client(lambda client: _export(client, order, None if to_stdout else output), migrate=False)
    if order.json_wanted:
        print_array(
            {"id": str(id), "done": error is None and not order.dry_run, "error": None if error is None else str(error)}
            for id, error in outcomes.items()
        )
    missing = [error for error in outcomes.values() if error is not None]
    for error in missing:
        Failure.of(error).show()
    if missing:
        sys.exit(FAILED)


async def _export(client: Client, order: Order, output: str | None) -> dict[UUID, PerdureError | None]:
    """Write them, or only list them; returns what is in the way, for each."""
    outcomes: dict[UUID, PerdureError | None] = {}
    rows: list[list[str]] = []
    indent = 2 if len(order.ids) == 1 else None
    with ExitStack() as stack:
        write = _writing(output, stack)
        async for id in _wanted(client, order):
            try:
                if order.dry_run:
                    info = await client.handle(id).describe()
                    rows.append([str(id), info.name, info.status.value])
                else:
                    write(as_json(await client.export(id), indent=indent))
                outcomes[id] = None
            except WorkflowNotFound as error:
                outcomes[id] = error
    if order.dry_run and not order.json_wanted:
        show([Column("id", whole=True), Column("name"), Column("status")], rows)
    if not order.json_wanted and (order.dry_run or not order.ids):
        click.echo(f"{counted(len(outcomes))} {'would be ' if order.dry_run else ''}exported", err=True)
    return outcomes


async def _wanted(client: Client, order: Order) -> AsyncIterator[UUID]:
    for id in order.ids:
        yield id
    if not order.ids:
        async for workflow in client.workflows(**await order.filters.arguments(client)):
            yield workflow.id


def _writing(output: str | None, stack: ExitStack) -> Callable[[str], None]:
    """What writes a line there; a file is opened when there is something to write."""

    @functools.cache
    def file() -> IO[bytes]:
        if output is None:
            stack.callback(sys.stdout.buffer.flush)
            return sys.stdout.buffer
        try:
            return stack.enter_context(Path(output).open("wb"))
        except OSError as error:
            raise Failure(f"can't write {output!r}: {error.strerror}") from error

    def write(text: str) -> None:
        # Half a surrogate pair has no UTF-8; in JSON it has an escape, which happens to be Python's.
        file().write(f"{text}\n".encode("utf-8", "backslashreplace"))

    return write


# --- import -----------------------------------------------------------------------------------------------------------


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="[FILE]", required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would be imported; write nothing.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array of {id, done, error}.")
@database_options
def import_(file: str | None, dry_run: bool, json_wanted: bool) -> None:
    """Bring in workflows that were exported.

    Reads what `perdure workflow export` wrote, from FILE or from stdin (-), and prints their ids. What hadn't ended
    waits for an operator here, because it may still run where it came from: `perdure workflow resume` lets it go on. Of
    many, each that can't be imported is a line on stderr, and the exit code is 1; the others are imported all the same.

    \b
    Examples:
      perdure workflow import stuck.json
      perdure workflow import --dry-run failed.jsonl
      perdure workflow import - < stuck.json
    """
    if file is None and on_terminal(sys.stdin):
        raise click.UsageError("give a FILE, or - to type it in")
    given = _read(file or "-")
    outcomes = with_client(lambda client: _import(client, given, dry_run, quiet=json_wanted), migrate=not dry_run)
    if json_wanted:
        print_array(
            {
                "id": None if id is None else str(id),
                "done": error is None and not dry_run,
                "error": None if error is None else str(error),
            }
            for id, error in outcomes
        )
    failed = [error for _, error in outcomes if error is not None]
    if len(given) == 1 and failed and not json_wanted:
        raise failed[0]
    for error in failed:
        error.show()
    if len(given) > 1 and not json_wanted:
        done = counted(len(outcomes) - len(failed))
        click.echo(f"{done} {'would be ' if dry_run else ''}imported", err=True)
    if failed:
        sys.exit(FAILED)


async def _import(
    client: Client, given: Sequence[dict[str, Any]], dry_run: bool, *, quiet: bool
) -> list[tuple[UUID | None, Failure | None]]:
    """Bring them in, one after the other; returns what is in the way, for each."""
    outcomes: list[tuple[UUID | None, Failure | None]] = []
    for exported in given:
        try:
            id, status = await (_rehearsed(client, exported) if dry_run else _imported(client, exported))
        except SerializationError as error:
            outcomes.append((None, Failure(str(error), MISCONFIGURED)))
        except KeyConflict as conflict:
            outcomes.append((conflict.workflow_id, Failure(await _told(client, conflict))))
        else:
            outcomes.append((id, None))
            if not quiet:
                click.echo(str(id))
                if not status.is_final and not dry_run:
                    note = f"note: it waits for an operator; 'perdure workflow resume {id}' lets it go on"
                    click.echo(note, err=True)
    return outcomes


async def _imported(client: Client, exported: dict[str, Any]) -> tuple[UUID, Status]:
    handle = await client.import_(exported)
    return handle.id, await handle.status()


async def _rehearsed(client: Client, exported: dict[str, Any]) -> tuple[UUID, Status]:
    """Whether it could be imported.

    Raises:
        SerializationError: It isn't what export writes.
        KeyConflict: It is there already, or its key is taken.
    """
    id, name, key = transfer.identity(exported)
    try:
        await client.handle(id).status()
    except WorkflowNotFound:
        holder = None if key is None else await client.find(name, key=key)
        if holder is None:
            return id, Status.WAITING
    raise KeyConflict(name, key or str(id), id)


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


def _read(file: str) -> list[dict[str, Any]]:
    """What stands there: one object, or one a line."""
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise _bad(file, f"can't be read: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and lines[0][1].rstrip().endswith(b"}"):
        return [_parsed(file, line, f", line {number},") for number, line in lines]
    return [_parsed(file, text, "")]


def _parsed(file: str, text: bytes, where: str) -> dict[str, Any]:
    try:
        exported = parsed(text)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"is no JSON: {error}", where) from None
    if not isinstance(exported, dict) or "perdure" not in exported:
        raise _bad(file, "holds no workflow; give what 'perdure workflow export' wrote", where)
    return cast("dict[str, Any]", exported)


def _bad(file: str, reason: str, where: str = "") -> click.BadParameter:
    return click.BadParameter(f"{'stdin' if file == '-' else repr(file)}{where} {reason}", param_hint="FILE")

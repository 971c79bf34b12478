"""`perdure workflow`: look at workflows and start them, without their code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID

import click

from perdure.authoring.workflows import Invocation
from perdure.cli.endings import Failure
from perdure.cli.options import database_options, duration, moment, pair, parsed, settings
from perdure.cli.tables import Column, as_dict, as_json, length, local, printable, shortened, show, styled
from perdure.client import Client
from perdure.errors import PerdureError, ResultTimeout, StepFailed
from perdure.handle import Handle
from perdure.model.records import StepInfo, WorkflowInfo
from perdure.model.statuses import Status
from perdure.store.programs import OnConflict

T = TypeVar("T")

_STEP_FAILED = f"{StepFailed.__module__}.{StepFailed.__qualname__}"


@click.group()
@database_options
def workflow() -> None:
    """List, show and start workflows. Needs none of their code.

    \b
    Examples:
      perdure workflow list --status error --since 1h
      perdure workflow show 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow start checkout '{"order_id": 42}' --key order-42 --wait
    """


def _with_client(use: Callable[[Client], Coroutine[Any, Any, T]], **changes: Any) -> T:
    """Use a client, and close it."""
    client = Client()
    client.settings = settings(**changes)

    async def main() -> T:
        async with client:
            return await use(client)

    return asyncio.run(main())


# --- list -------------------------------------------------------------------------------------------------------------


@workflow.command("list")
@click.option("--status", type=click.Choice([status.value for status in Status]), help="Only those that stand there.")
@click.option("--name", help="Only workflows of that name.")
@click.option("--queue", help="Only those of that queue.")
@click.option("--key-prefix", metavar="TEXT", help="Only those whose key begins so.")
@click.option(
    "--since", type=moment, metavar="WHEN", help="Only those created at that instant or later, or so long ago."
)
@click.option("--until", type=moment, metavar="WHEN", help="Only those created before that instant.")
@click.option(
    "--attribute",
    "attributes",
    type=pair,
    metavar="NAME=VALUE",
    multiple=True,
    help="Only those with that attribute; the value is JSON, or else a text. Repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array.")
@database_options
def list_(
    status: str | None,
    name: str | None,
    queue: str | None,
    key_prefix: str | None,
    since: datetime | timedelta | None,
    until: datetime | timedelta | None,
    attributes: tuple[tuple[str, Any], ...],
    limit: int,
    json_wanted: bool,
) -> None:
    """List workflows, newest first.

    WHEN is an instant such as 2026-01-31T12:00:00Z (local time if it has no offset), or a duration such as 90s, 1h or
    2d: so long ago.

    \b
    Examples:
      perdure workflow list
      perdure workflow list --status error --since 1d --attribute tenant=acme
      perdure workflow list --name checkout --json | jq '.[].id'
    """

    async def use(client: Client) -> list[WorkflowInfo]:
        rows = client.workflows(
            status=None if status is None else Status(status),
            name=name,
            queue=queue,
            key_prefix=key_prefix,
            since=await _instant(client, since),
            until=await _instant(client, until),
            attributes=dict(attributes) or None,
            limit=limit,
        )
        return [row async for row in rows]

    found = _with_client(use, migrate=False)
    if json_wanted:
        _print_array(found)
        return
    columns = [Column("id", whole=True), *map(Column, ("name", "status", "queue", "key", "created", "took", "note"))]
    show(columns, [_cells(row) for row in found])


async def _instant(client: Client, when: datetime | timedelta | None) -> datetime | None:
    """An instant; "so long ago" is counted from the database's now."""
    if not isinstance(when, timedelta):
        return when
    (clock,) = await client.session().database.fetch("clock")
    return cast("datetime", clock.now) - when


def _cells(row: WorkflowInfo) -> list[str]:
    took = row.completed_at - (row.started_at or row.created_at) if row.completed_at is not None else None
    created = local(row.created_at)
    return [str(row.id), row.name, row.status.value, row.queue, row.key or "", created, length(took), _note(row)]


def _note(row: WorkflowInfo) -> str:
    if row.error is not None:
        return shortened(_error_line(row.error), 80)
    if row.waiting_for is not None:
        return f"for {row.waiting_for}" + (f" until {local(row.wake_at)}" if row.wake_at is not None else "")
    return ""


# --- show -------------------------------------------------------------------------------------------------------------


@workflow.command("show")
@click.argument("id", type=click.UUID)
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one object.")
@database_options
def show_(id: UUID, json_wanted: bool) -> None:
    """Show a workflow: where it stands, its input, and its output or its error.

    \b
    Examples:
      perdure workflow show 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow show 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --json | jq .output
    """
    row = _with_client(lambda client: client.handle(id).describe(), migrate=False)
    if json_wanted:
        click.echo(as_json(as_dict(row)))
    else:
        click.echo("\n".join(_details(row)))


_DETAILS = (
    "id", "name", "key", "status", "queue", "priority", "partition", "attributes", "version", "parent_id", "created_at",
    "started_at", "waiting_for", "wake_at", "deadline", "completed_at", "worker_id", "epoch", "recoveries",
)  # fmt: skip


def _details(row: WorkflowInfo) -> Iterable[str]:
    """Line by line; what is empty is left out."""
    for field in _DETAILS:
        value = getattr(row, field)
        if isinstance(value, UUID):
            value = str(value)
        if value is None or (field in ("priority", "recoveries") and value == 0):
            continue
        text = local(value) if isinstance(value, datetime) else value if isinstance(value, str) else as_json(value)
        yield f"{click.style(f'{field:<14}', bold=True)}{styled(text) if field == 'status' else printable(text)}"
    for field in ("input", "output"):
        if getattr(row, field) is not None or (field == "output" and row.status is Status.SUCCESS):
            yield f"{click.style(field, bold=True)}\n{_indented(as_json(getattr(row, field), indent=2))}"
    if row.error is not None:
        yield f"{click.style('error', bold=True)}\n{_indented(_error_line(row.error))}"
        if trace := _record(row.error).get("traceback"):
            yield f"{click.style('traceback', bold=True)}\n{_indented(str(trace))}"


def _indented(text: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in text.rstrip("\n").split("\n"))


def _error_line(error: Any) -> str:
    """`shop.CardDeclined: no funds`."""
    record = _record(error)
    if not record:
        return str(error)
    args = record.get("args")
    if record.get("type") == _STEP_FAILED and isinstance(args, list):
        return ": ".join(map(str, cast("Iterable[Any]", args[:2])))  # without the advice on how to catch it
    kind = str(record.get("type", "unknown")).removeprefix("builtins.")
    return f"{kind}: {record.get('message', '')}"


def _record(error: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", error) if isinstance(error, dict) else {}


# --- steps ------------------------------------------------------------------------------------------------------------


@workflow.command("steps")
@click.argument("id", type=click.UUID)
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array.")
@database_options
def steps(id: UUID, json_wanted: bool) -> None:
    """List the steps of a workflow, in the order in which its code got their outcomes.

    \b
    Examples:
      perdure workflow steps 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow steps 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --json | jq '.[] | {key, output}'
    """

    async def use(client: Client) -> list[StepInfo]:
        handle = client.handle(id)
        rows = list(await handle.steps())
        if not rows:
            await handle.status()  # none because there is no such workflow?
        return rows

    found = _with_client(use, migrate=False)
    if json_wanted:
        _print_array(found)
        return
    columns = [Column("position"), Column("key", whole=True), *map(Column, ("status", "attempts", "took", "output"))]
    show(columns, [_step_cells(row) for row in found])


def _step_cells(row: StepInfo) -> list[str]:
    took = row.completed_at - row.started_at if row.completed_at is not None and row.started_at is not None else None
    if row.status == "success":
        outcome = as_json(row.output)
    else:
        outcome = _error_line(row.error) if row.error is not None else ""
    position = "" if row.position is None else str(row.position)
    return [position, row.key, row.status, str(row.attempts), length(took), shortened(outcome)]


def _print_array(rows: Iterable[WorkflowInfo | StepInfo]) -> None:
    """One array, one row a line."""
    lines = ",\n".join(as_json(as_dict(row)) for row in rows)
    click.echo(f"[{lines}]")


# --- start ------------------------------------------------------------------------------------------------------------


@workflow.command("start")
@click.argument("name")
@click.argument("arguments", metavar="[ARGUMENTS]", required=False)
@click.option(
    "--arg",
    "named",
    type=pair,
    metavar="NAME=VALUE",
    multiple=True,
    help="One argument; the value is JSON, or else a text. Repeatable.",
)
@click.option("--key", help="Makes starting idempotent: a second start under it finds the first one's workflow.")
@click.option(
    "--on-conflict",
    type=click.Choice(["attach", "raise", "replace_finished"]),
    default="attach",
    show_default=True,
    help="What to do about a key that is taken.",
)
@click.option("--queue", help="Where it waits. [default: default]")
@click.option("--priority", type=int, default=0, show_default=True, help="Higher runs first.")
@click.option("--delay", type=duration, metavar="DURATION", help="Not before so long from now, such as 5m.")
@click.option(
    "--attribute",
    "attributes",
    type=pair,
    metavar="NAME=VALUE",
    multiple=True,
    help="To find it by; the value is JSON, or else a text. Repeatable.",
)
@click.option("--wait", is_flag=True, help="Wait for the result and print it as JSON; the id goes to stderr.")
@click.option("--timeout", type=duration, metavar="DURATION", help="Wait no longer than this; then exit code 4.")
@database_options
def start(
    name: str,
    arguments: str | None,
    named: tuple[tuple[str, Any], ...],
    key: str | None,
    on_conflict: str,
    queue: str | None,
    priority: int,
    delay: timedelta | None,
    attributes: tuple[tuple[str, Any], ...],
    wait: bool,
    timeout: timedelta | None,
) -> None:
    """Start a workflow and print its id.

    ARGUMENTS is JSON: an object of the workflow's parameters, an array of them in order, or - to read it from stdin.
    Where the code doesn't accept them, the workflow ends in error: nobody here knows its signature, nor its queue.

    With --wait: exit code 0 when it succeeded, 1 when it failed or was cancelled.

    \b
    Examples:
      perdure workflow start checkout '{"order_id": 42, "express": true}'
      perdure workflow start checkout --arg order_id=42 --key order-42 --queue eu --delay 5m
      perdure workflow start checkout '[42]' --wait --timeout 30s
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    positional, keywords = _arguments(arguments, named)

    async def use(client: Client) -> None:
        invocation: Invocation[Any] = Invocation(name, *positional, **keywords)
        handle = await client.start(
            invocation,
            key=key,
            on_conflict=cast("OnConflict", on_conflict),
            queue=queue,
            priority=priority,
            delay=delay,
            attributes=dict(attributes) or None,
        )
        click.echo(str(handle.id), err=wait)
        if not handle.started:
            click.echo(f"note: key {key!r} is held by this workflow, which was started before", err=True)
        if wait:
            click.echo(as_json(await _result(handle, timeout)))

    try:
        _with_client(use)
    except PerdureError:
        raise
    except ValueError as error:  # a key or a priority that can't be one
        raise click.UsageError(str(error)) from error


def _arguments(text: str | None, named: tuple[tuple[str, Any], ...]) -> tuple[list[Any], dict[str, Any]]:
    """What is given by position, and what by name."""
    given: Any = {}
    if text is not None:
        try:
            given = parsed(sys.stdin.read() if text == "-" else text)
        except (ValueError, RecursionError) as error:
            raise click.BadParameter(f"it is no JSON: {error}", param_hint="ARGUMENTS") from None
    if isinstance(given, list):
        return cast("list[Any]", given), dict(named)  # type: ignore[redundant-cast]
    if not isinstance(given, dict):
        raise click.BadParameter('give an object or an array, such as {"order_id": 42}', param_hint="ARGUMENTS")
    return [], {**cast("dict[str, Any]", given), **dict(named)}


async def _result(handle: Handle[Any], timeout: timedelta | None) -> Any:
    """What it returned.

    Raises:
        Failure: It failed.
    """
    try:
        return await handle.result(timeout=timeout)
    except Exception as error:
        # What a workflow failed with is raised as itself, and it may look like any error of this client's own.
        if isinstance(error, ResultTimeout) and error.workflow_id == handle.id:
            raise
        row = await handle.describe()
        if not row.status.is_final:
            raise
        what = "was cancelled" if row.status is Status.CANCELLED else f"failed with {_error_line(row.error)}"
        raise Failure(f"workflow {handle.id} {what}; 'perdure workflow show {handle.id}' shows more") from None

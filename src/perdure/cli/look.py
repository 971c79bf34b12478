"""`perdure workflow list`, `show` and `steps`: what there is, without its code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import click

from perdure.cli.clients import with_client
from perdure.cli.filters import Filters, filter_options
from perdure.cli.options import database_options
from perdure.cli.tables import (
    Column,
    as_dict,
    as_json,
    error_line,
    error_record,
    length,
    local,
    print_array,
    printable,
    shortened,
    show,
    styled,
)
from perdure.client import Client
from perdure.model.keys import DEADLINE, attempted_key
from perdure.model.records import StepInfo, WorkflowInfo
from perdure.model.statuses import Status
from perdure.store.arrays import BigInts, Uuids
from perdure.store.statements import SHARD

_NO_MESSAGES = 2**62  # behind all of them

# --- list -------------------------------------------------------------------------------------------------------------


@click.command("list")
@filter_options()
@click.option("--parent", type=click.UUID, metavar="ID", help="Only the children of that workflow.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array.")
@database_options
def list_(filters: Filters, parent: UUID | None, limit: int, json_wanted: bool) -> None:
    """List workflows, newest first.

    \b
    Examples:
      perdure workflow list
      perdure workflow list --status error --since 1d --attribute tenant=acme
      perdure workflow list --name checkout --json | jq '.[].id'
    """

    async def use(client: Client) -> list[WorkflowInfo]:
        return [row async for row in client.workflows(parent=parent, limit=limit, **await filters.arguments(client))]

    found = with_client(use, migrate=False)
    if json_wanted:
        print_array(map(as_dict, found))
        return
    columns = [Column("id", whole=True), *map(Column, ("name", "status", "queue", "key", "created", "took", "note"))]
    show(columns, [_cells(row) for row in found])


def _cells(row: WorkflowInfo) -> list[str]:
    took = row.completed_at - (row.started_at or row.created_at) if row.completed_at is not None else None
    created = local(row.created_at)
    return [str(row.id), row.name, row.status.value, row.queue, row.key or "", created, length(took), _note(row)]


def _note(row: WorkflowInfo) -> str:
    if row.error is not None:
        return shortened(error_line(row.error), 80)
    if row.waiting_for is not None:
        return f"for {row.waiting_for}" + (f" until {local(row.wake_at)}" if row.wake_at is not None else "")
    return ""


# --- show -------------------------------------------------------------------------------------------------------------


@click.command("show")
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

    async def use(client: Client) -> tuple[WorkflowInfo, list[str]]:
        row = await client.handle(id).describe()
        return row, await _requests(client, row)

    row, requests = with_client(use, migrate=False)
    if json_wanted:
        click.echo(as_json(as_dict(row)))
    else:
        click.echo("\n".join(_details(row, requests)))


async def _requests(client: Client, row: WorkflowInfo) -> list[str]:
    """Who has asked a workflow to end that is pending or running."""
    if row.status not in (Status.PENDING, Status.RUNNING):
        return []
    database = client.session().database
    found = await database.fetch("requests", SHARD, row.worker_id, Uuids([row.id]), BigInts([_NO_MESSAGES]))
    return [_asked(json.loads(each.payload)) for each in found if each.kind == "request"]


def _asked(said: Any) -> str:
    """Why a workflow is to end."""
    record = error_record(said)
    if record.get("by") == DEADLINE:
        return "its deadline has passed, and it was asked to end"
    reason = record.get("reason")
    return "it was asked to end" + (f": {reason}" if reason else "")


_DETAILS = (
    "id", "name", "key", "status", "queue", "priority", "partition", "attributes", "version", "parent_id", "created_at",
    "started_at", "waiting_for", "wake_at", "deadline", "completed_at", "worker_id", "epoch", "recoveries",
)  # fmt: skip


def _details(row: WorkflowInfo, requests: Iterable[str]) -> Iterable[str]:
    """Line by line; what is empty is left out."""
    for field in _DETAILS:
        value = getattr(row, field)
        if isinstance(value, UUID):
            value = str(value)
        if value is None or (field in ("priority", "recoveries") and value == 0):
            continue
        text = local(value) if isinstance(value, datetime) else value if isinstance(value, str) else as_json(value)
        yield f"{_title(field)}{styled(text) if field == 'status' else printable(text)}"
    for request in requests:
        yield f"{_title('note')}{printable(request)}"
    for field in ("input", "output"):
        if getattr(row, field) is not None or (field == "output" and row.status is Status.SUCCESS):
            yield f"{click.style(field, bold=True)}\n{_indented(as_json(getattr(row, field), indent=2))}"
    if row.error is not None:
        yield f"{click.style('error', bold=True)}\n{_indented(error_line(row.error))}"
        if trace := error_record(row.error).get("traceback"):
            yield f"{click.style('traceback', bold=True)}\n{_indented(str(trace))}"


def _title(field: str) -> str:
    return click.style(f"{field:<14}", bold=True)


def _indented(text: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in text.rstrip("\n").split("\n"))


# --- steps ------------------------------------------------------------------------------------------------------------


@click.command("steps")
@click.argument("id", type=click.UUID)
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one array.")
@database_options
def steps(id: UUID, json_wanted: bool) -> None:
    """List the steps of a workflow, in the order in which its code got their outcomes.

    What has no outcome yet comes last: steps that run, waits that aren't over, and failed attempts, one by one: another
    one follows (retrying), or an operator must see to it (parked).

    \b
    Examples:
      perdure workflow steps 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow steps 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --json | jq '.[] | {key, output}'
    """
    found = sorted(with_client(lambda client: client.handle(id).steps(), migrate=False), key=_place)
    if json_wanted:
        print_array(map(as_dict, found))
        return
    columns = [Column("position"), Column("key", whole=True), *map(Column, ("status", "attempts", "took", "output"))]
    show(columns, list(_step_rows(found)))
    if any(row.status == "parked" for row in found):
        click.echo(f"note: 'perdure workflow resume {id}' tries anew what is parked", err=True)


def _place(row: StepInfo) -> tuple[bool, int, str, int]:
    """The tenth attempt comes after the second."""
    key = attempted_key(row.key) if row.kind == "attempt" else row.key
    return row.position is None, row.position or 0, key, row.attempts


def _step_rows(found: Sequence[StepInfo]) -> Iterable[list[str]]:
    last = {attempted_key(row.key): row for row in found if row.kind == "attempt"}
    for row in found:
        is_last = row.kind == "attempt" and last[attempted_key(row.key)] is row
        yield _step_cells(row, is_last=is_last)


def _step_cells(row: StepInfo, *, is_last: bool) -> list[str]:
    took = row.completed_at - row.started_at if row.completed_at is not None and row.started_at is not None else None
    position = "" if row.position is None else str(row.position)
    attempts = "" if row.kind in ("sleep", "cancel") else str(row.attempts)
    return [position, row.key, row.status, attempts, length(took), _outcome(row, is_last=is_last)]


def _outcome(row: StepInfo, *, is_last: bool) -> str:
    if row.kind == "sleep":
        return f"until {local(row.wake_at)}" if row.wake_at is not None else ""
    if row.kind == "cancel":
        return shortened(_asked(row.error))
    if row.status == "success":
        return shortened(as_json(row.output))
    outcome = shortened(error_line(row.error)) if row.error is not None else ""
    if row.status == "parked":
        return f"{outcome}; waits for an operator"
    if row.status == "retrying" and is_last and row.wake_at is not None:
        return f"{outcome}; next attempt {local(row.wake_at)}"
    return outcome

"""`perdure workflow start`: start a workflow, without its code."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any, cast

import click

from perdure.authoring.workflows import Invocation
from perdure.cli.clients import with_client
from perdure.cli.endings import Failure
from perdure.cli.options import database_options, duration, pair, parsed
from perdure.cli.tables import as_json, error_line
from perdure.client import Client
from perdure.errors import PerdureError, ResultTimeout
from perdure.handle import Handle
from perdure.model.statuses import Status
from perdure.store.programs import OnConflict


@click.command("start")
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
        with_client(use)
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
        what = "was cancelled" if row.status is Status.CANCELLED else f"failed with {error_line(row.error)}"
        raise Failure(f"workflow {handle.id} {what}; 'perdure workflow show {handle.id}' shows more") from None

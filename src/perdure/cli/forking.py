"""`perdure workflow fork` and `rewind`: let a workflow go on from an earlier step, in a copy of it, or in place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import click

from perdure.cli.clients import with_client
from perdure.cli.options import database_options, filled, pair
from perdure.client import Client
from perdure.handle import Handle

_AFTER = "The key of the step (perdure workflow steps ID). [default: the last one of the patch, else the last one]"
_after = click.option("--after", type=filled, metavar="KEY", help=_AFTER)
_patch = click.option(
    "--patch",
    type=pair,
    metavar="KEY=VALUE",
    multiple=True,
    help="What takes the place of the output of that step: JSON, or else a text. Repeatable.",
)


@click.command("fork")
@click.argument("id", type=click.UUID)
@_after
@_patch
@database_options
def fork(id: UUID, after: str | None, patch: tuple[tuple[str, Any], ...]) -> None:
    """Start a copy of a workflow that goes on behind a step. Prints its id.

    What was recorded up to that step isn't done again; from there on the code runs. The original isn't touched.

    \b
    Examples:
      perdure workflow fork 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --after charge
      perdure workflow fork 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --patch 'price=999'
    """
    _do(lambda client: client.fork(id, after=after, patch=dict(patch)))


@click.command("rewind")
@click.argument("id", type=click.UUID)
@_after
@_patch
@database_options
def rewind(id: UUID, after: str | None, patch: tuple[tuple[str, Any], ...]) -> None:
    """Let a workflow that has ended go on behind a step, in place. Prints its id.

    What it had recorded behind that step, and its result, are kept as history, and don't count any more.

    \b
    Examples:
      perdure workflow rewind 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --after charge
      perdure workflow rewind 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --after '$input'
    """
    _do(lambda client: client.rewind(id, after=after, patch=dict(patch)))


def _do(verb: Callable[[Client], Awaitable[Handle[Any]]]) -> None:
    async def use(client: Client) -> UUID:
        return (await verb(client)).id

    click.echo(str(with_client(use, migrate=False)))

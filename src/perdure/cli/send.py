"""`perdure workflow send`: send a message to a workflow, without its code."""

from __future__ import annotations

import sys
from typing import Any
from uuid import UUID

import click

from perdure.cli.clients import with_client
from perdure.cli.options import database_options, filled, parsed
from perdure.client import Client


@click.command("send")
@click.argument("id", type=click.UUID)
@click.argument("topic")
@click.argument("value", required=False)
@click.option("--idempotency-key", type=filled, metavar="TEXT", help="A second message of that key isn't sent.")
@database_options
def send(id: UUID, topic: str, value: str | None, idempotency_key: str | None) -> None:
    """Send a message to a workflow, which gets it by recv(TOPIC). Prints nothing.

    VALUE is JSON, null where it is left out, or - to read it from stdin. Messages of a topic come in the order in which
    they were sent; one that nobody receives is kept until its workflow is deleted.

    \b
    Examples:
      perdure workflow send 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 approval true
      perdure workflow send 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 order '{"id": 42}' --idempotency-key order-42
    """
    message = _value(value)

    async def use(client: Client) -> None:
        await client.handle(id).send(topic, message, idempotency_key=idempotency_key)

    with_client(use, migrate=False)


def _value(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return parsed(sys.stdin.read() if text == "-" else text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"it is no JSON: {error}; a text needs quotes: '\"yes\"'", param_hint="VALUE"
        ) from None

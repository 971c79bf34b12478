"""`perdure workflow stream`: what a workflow writes, as it comes."""

from __future__ import annotations

from uuid import UUID

import click

from perdure.cli.clients import with_client
from perdure.cli.options import database_options
from perdure.cli.tables import as_json
from perdure.client import Client
from perdure.streams import StreamReset


@click.command("stream")
@click.argument("id", type=click.UUID)
@click.argument("name")
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True, help="Where to begin.")
@database_options
def stream(id: UUID, name: str, offset: int) -> None:
    """Print the entries of a stream as they come. It ends with the workflow.

    Each entry is a JSON object on a line of its own. A line with "reset" says that a step runs again, and that its
    entries from that offset on are void.

    \b
    Examples:
      perdure workflow stream 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 tokens | jq -r '.value // empty'
    """

    async def use(client: Client) -> None:
        async for entry in client.handle(id).read_stream(name, offset=offset):
            line = {"offset": entry.offset, "step": entry.step, "attempt": entry.attempt}
            what = {"reset": True} if isinstance(entry, StreamReset) else {"value": entry.value}
            click.echo(as_json(line | what))

    with_client(use, migrate=False)

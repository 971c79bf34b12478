"""The command line: `perdure COMMAND`."""

from __future__ import annotations

import sys

import click

from perdure import __version__
from perdure.cli.postgres import postgres
from perdure.errors import PerdureError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="perdure")
def cli() -> None:
    """Durable workflows in Python, with PostgreSQL as the only orchestrator."""


cli.add_command(postgres)


def main() -> None:
    """The entry point: errors that perdure raises on purpose are one line, and exit code 2."""
    try:
        cli()
    except PerdureError as error:
        click.echo(f"perdure: {error}", err=True)
        sys.exit(2)

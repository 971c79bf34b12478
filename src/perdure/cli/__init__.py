"""The command line: `perdure COMMAND`. A command's module is imported when the command is called."""

from __future__ import annotations

import click

from perdure import __version__
from perdure.cli.commands import Commands, Lazy
from perdure.cli.options import database_options

_LATER = {
    "check": Lazy("perdure.cli.check:check", "Replay the workflows of a database with the code at hand."),
    "demo": Lazy("perdure.cli.demo:demo", "Watch workflows survive the death of a worker."),
    "doctor": Lazy(
        "perdure.cli.doctor:doctor", "Look for what is wrong with the database, the way to it, and the work in it."
    ),
    "migrate": Lazy("perdure.cli.migrate:migrate", "Make the schema in the database, or bring it up to date."),
    "postgres": Lazy("perdure.cli.postgres:postgres", "The PostgreSQL that perdure starts itself, by hand."),
    "prune": Lazy("perdure.cli.manage:prune", "Delete what has been over for longer than it is kept."),
    "version": Lazy("perdure.cli.version:version", "Say which versions work together here."),
    "versions": Lazy("perdure.cli.versions:versions", "List the versions of unfinished workflows, and who runs them."),
    "worker": Lazy("perdure.cli.worker:worker", "Run the workflows of an app."),
    "workflow": Lazy("perdure.cli.workflows:workflow", "List, show, start and manage workflows."),
}


@click.group(cls=Commands, later=_LATER, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="perdure")
@database_options
def cli() -> None:
    """Durable workflows in Python, with PostgreSQL as the only orchestrator.

    \b
    Examples:
      perdure worker shop:app
      perdure workflow start checkout '{"order_id": 42}' --wait
      perdure workflow list --status error --since 1h

    \b
    Exit codes:
      0    done
      1    it failed: the workflow ended in error, the key is taken, there is no such workflow, ...
      2    wrong usage or configuration: the URL, the password, rights, the schema, the code of the app
      3    the database gave no answer; try again
      4    the result wasn't there in time; the workflow goes on
      130  Ctrl-C
    """


def main() -> None:
    """The entry point."""
    cli(prog_name="perdure")

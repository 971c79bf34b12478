"""`perdure demo`: the main job on real input."""

from __future__ import annotations

import sys

import click

from perdure.demo.play import MOST_WORKERS, Plan, perform
from perdure.demo.workers import Broken


@click.command()
@click.option("--files", default=5000, show_default=True, type=click.IntRange(min=1), help="How many files to ingest.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1, MOST_WORKERS), help="How many worker processes."
)
@click.option("--no-kill", is_flag=True, help="Let all workers live.")
@click.option("--keep", is_flag=True, help="Leave the tables there, to look at.")
@click.option("--database-url", help="Where to run; else PERDURE_DATABASE_URL, else the embedded PostgreSQL.")
def demo(files: int, workers: int, no_kill: bool, keep: bool, database_url: str | None) -> None:
    """Ingest Python's standard library, kill a worker in the middle, and prove that nothing is lost.

    One workflow a file: read it, parse it, tokenise it, and write a row of results in a transactional step. In the
    middle one of the workers gets a SIGKILL, and another one takes its workflows over. Everything is in the schema
    perdure_demo, which is made anew. Exit code 1: something was lost or done twice, or nothing was in flight.

    \b
    Examples:
      perdure demo
      perdure demo --files 500 --no-kill
      perdure demo --keep && perdure postgres psql -c 'SELECT * FROM perdure_demo.results LIMIT 5'
    """
    if workers == 1 and not no_kill:
        raise click.UsageError("nobody could take over from a single worker; use --workers 2 or more, or --no-kill")
    plan = Plan(database_url=database_url, files=files, workers=workers, kill=not no_kill, keep=keep)
    try:
        proven = perform(plan)
    except Broken as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("stopped; the workers have ended", err=True)
        sys.exit(130)
    sys.exit(0 if proven else 1)

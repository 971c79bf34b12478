"""`perdure check`: whether the code at hand can go on with the workflows in a database."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import UUID

import click

from perdure import gate
from perdure.app import App
from perdure.cli.filters import Filters, filter_options
from perdure.cli.loading import load
from perdure.cli.options import PATIENCE, app_database_options, given
from perdure.cli.tables import as_dict, as_json, printable
from perdure.model.records import WorkflowInfo
from perdure.model.replay import Replayed, Verdict
from perdure.model.statuses import Status

_NOBODY = UUID(int=0)
_COLOURS = {Verdict.MATCHES: "green", Verdict.DIFFERS: "yellow", Verdict.MISMATCH: "red"}


class _Report:
    """What came of it, counted; and what doesn't match, one by one."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.counts: Counter[Verdict] = Counter()
        self.unknown: Counter[str] = Counter()
        self.parted: list[Replayed] = []

    def add(self, replayed: Replayed) -> None:
        self.counts[replayed.verdict] += 1
        if replayed.verdict is not Verdict.MATCHES:
            self.parted.append(replayed)

    def fails(self, strict: bool) -> bool:
        """Whether this code must not be deployed."""
        unsure = self.counts[Verdict.DIFFERS] or self.unknown
        return bool(self.counts[Verdict.MISMATCH] or (strict and unsure))

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "replayed": self.counts.total(),
            "matches": self.counts[Verdict.MATCHES],
            "differs": self.counts[Verdict.DIFFERS],
            "mismatch": self.counts[Verdict.MISMATCH],
            "unknown": dict(sorted(self.unknown.items())),
            "workflows": [as_dict(replayed) for replayed in self.parted],
        }


@click.command()
@click.argument("reference", metavar="MODULE:APP")
@click.option("--against", metavar="URL", help="The database to check against; the same as --database-url.")
@filter_options(
    status_help="Only those that stand there. [default: all that haven't ended, and a sample of the others]"
)
@click.option(
    "--finished",
    type=click.IntRange(min=0),
    metavar="N",
    default=100,
    show_default=True,
    help="How many of those that have ended, the newest first: so many that succeeded, and so many that failed.",
)
@click.option("--strict", is_flag=True, help="Fail for what differs, and for names that the app doesn't know, as well.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one object.")
@app_database_options
def check(
    reference: str, against: str | None, filters: Filters, finished: int, strict: bool, json_wanted: bool
) -> None:
    """Replay the workflows of a database with the code at hand. Writes nothing, and runs no step.

    All that haven't ended are replayed, and a sample of those that have. MODULE alone means the only App in it; the
    current folder is on the import path. The right to read is enough, and so is a standby.

    \b
    What comes of a workflow:
      matches   this code asks for what was recorded, and goes on from there
      differs   it would go on, but on another path: it asks for something new before all that was recorded is served,
                no longer asks for something, or comes to another end
      mismatch  a worker would end it in error: this code asks for something else than what was recorded, can't read
                its input, or fails

    \b
    Exit codes:
      0    no mismatch
      1    a mismatch (with --strict: something differs, or the app doesn't know a name)

    \b
    Examples:
      perdure check shop:app --against postgresql://reader@db/shop
      perdure check shop:app --name checkout --finished 1000 --json
    """
    app = load(reference)
    target = given()
    app.settings = replace(
        app.settings,
        database_url=against or target.database_url or app.settings.database_url,
        schema=target.schema or app.settings.schema,
        connect_timeout=PATIENCE,
        migrate=False,
        read_only=True,
    )
    report = asyncio.run(_check(app, filters, finished))
    if json_wanted:
        click.echo(as_json(report.as_dict(), indent=2))
    else:
        _print(report)
    if report.fails(strict):
        raise click.exceptions.Exit(1)


async def _check(app: App, filters: Filters, finished: int) -> _Report:
    report = _Report(app.version)
    async with app, aclosing(_wanted(app, filters, finished, report)) as wanted:
        async for replayed in gate.replay(app, wanted):
            report.add(replayed)
    return report


async def _wanted(app: App, filters: Filters, finished: int, report: _Report) -> AsyncGenerator[WorkflowInfo]:
    """What is to be replayed; names that the app doesn't know are counted."""
    arguments = await filters.arguments(app)
    only = arguments.pop("status", None)
    for status in Status if only is None else (only,):
        limit = finished if status.is_final else None
        async for workflow in app.workflows(status=status, limit=limit, **arguments):
            if workflow.name in app.names:
                yield workflow
            elif not status.is_final:
                report.unknown[workflow.name] += 1


def _print(report: _Report) -> None:
    alike: dict[Replayed, list[Replayed]] = {}
    for replayed in report.parted:
        alike.setdefault(replace(replayed, workflow_id=_NOBODY), []).append(replayed)
    for group in alike.values():
        _print_parting(group[0], len(group) - 1, report.version)
    counts = ", ".join(f"{report.counts[verdict]} {word}" for verdict, word in _WORDS.items())
    total = report.counts.total()
    click.echo(f"{total} workflow{'' if total == 1 else 's'} replayed with version {report.version}: {counts}")
    if report.unknown:
        names = ", ".join(f"{printable(name)} ({count})" for name, count in sorted(report.unknown.items()))
        click.echo(f"unfinished workflows of names that this app doesn't know: {names}")


_WORDS = {Verdict.MATCHES: "match", Verdict.DIFFERS: "differ", Verdict.MISMATCH: "mismatch"}


def _print_parting(replayed: Replayed, others: int, version: str) -> None:
    verdict = click.style(replayed.verdict.value, fg=_COLOURS[replayed.verdict])
    more = f" and {others} more" if others else ""
    click.echo(f"{replayed.name} {replayed.workflow_id}{more}: {verdict}: {printable(replayed.note)}")
    if replayed.key:
        position = f" (outcome {replayed.position})" if replayed.position else ""
        click.echo(f"    at {printable(replayed.key)}{position}")
    if replayed.recorded:
        by = f"  [version {replayed.version}]" if replayed.version else ""
        click.echo(click.style(f"  - {printable(replayed.recorded)}{by}", fg="red"))
    if replayed.asked:
        click.echo(click.style(f"  + {printable(replayed.asked)}  [version {version}]", fg="green"))

"""`perdure workflow cancel`, `terminate`, `resume`, `delete` and `prune`: what operators do to workflows."""

from __future__ import annotations

from datetime import timedelta

import click

from perdure import management
from perdure.cli.clients import with_client
from perdure.cli.options import age, database_options, filled
from perdure.cli.orders import Deed, Order, carry_out, counted, ordering, waits_for_operator
from perdure.cli.tables import as_json
from perdure.model.statuses import Status

_UNFINISHED = (Status.PENDING, Status.RUNNING, Status.WAITING)
_RESUMABLE = (Status.ERROR, Status.CANCELLED, Status.WAITING, Status.RUNNING)
_FINAL = (Status.SUCCESS, Status.ERROR, Status.CANCELLED)

_reason = click.option("--reason", metavar="TEXT", help="Why; it stands in their error.")


@click.command("cancel")
@_reason
@ordering(
    _UNFINISHED, "Only those that stand there. [default: all three]", "All that haven't ended; goes with no filter."
)
def cancel(order: Order, reason: str | None) -> None:
    """Ask workflows to end: their code may clean up. Prints their ids.

    It gets CancelledError where it waits. Give ids or a filter. Of ids, each that can't be cancelled is a line on
    stderr, and the exit code is 1; the others are cancelled all the same. What a filter found and has ended meanwhile
    is left as it is.

    \b
    Examples:
      perdure workflow cancel 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001 --reason "order withdrawn"
      perdure workflow cancel --name checkout --attribute tenant=acme --dry-run
      perdure workflow cancel --all
    """
    carry_out(
        Deed(
            verb=lambda session: management.cancel(session, reason),
            find=lambda client: client.cancel_many,
            done="asked to end",
        ),
        order,
    )


@click.command("terminate")
@_reason
@ordering(
    _UNFINISHED,
    "Only those that stand there. [default: all three]",
    "All that haven't ended; goes with no filter.",
    asks=True,
)
def terminate(order: Order, reason: str | None) -> None:
    """End workflows at once: no more of their code runs, not even to clean up. Prints their ids.

    Give ids or a filter; with a filter it asks before it begins, and needs --yes where stdin is no terminal. Of ids,
    each that can't be terminated is a line on stderr, and the exit code is 1; the others are terminated all the same.

    \b
    Examples:
      perdure workflow terminate 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow terminate --queue eu --status running --dry-run
      perdure workflow terminate --queue eu --status running --yes --reason "wrong deploy"
    """
    carry_out(
        Deed(
            verb=lambda session: management.terminate(session, reason),
            find=lambda client: client.terminate_many,
            done="terminated",
            question="Terminate {}, without any cleaning up?",
        ),
        order,
    )


@click.command("resume")
@ordering(
    _RESUMABLE,
    "Only those that stand there; waiting and running ones are resumed where steps are parked. [default: error]",
    "All that failed; goes with no filter.",
)
def resume(order: Order) -> None:
    """Let workflows go on from their last checkpoint. Prints their ids.

    Those that failed or were cancelled, have a parked step, or were imported: the failure is set aside, and everything
    else that was recorded stays. Give ids or a filter. Of ids, each that can't be resumed is a line on stderr, and the
    exit code is 1; the others are resumed all the same.

    \b
    Examples:
      perdure workflow resume 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow resume --name checkout --since 1h --dry-run
      perdure workflow resume --status waiting --name checkout
    """
    carry_out(
        Deed(
            verb=management.resume,
            find=lambda client: client.resume_many,
            done="resumed",
            is_possible=waits_for_operator,
        ),
        order,
    )


@click.command("delete")
@ordering(
    _FINAL,
    "Only those that ended so. [default: all three]",
    "All that have ended; goes with no filter.",
    asks=True,
)
def delete(order: Order) -> None:
    """Delete workflows that have ended. Prints their ids.

    All that they recorded goes with them, and their keys are free again. Give ids or a filter; with a filter it asks
    before it begins, and needs --yes where stdin is no terminal. Of ids, each that can't be deleted is a line on
    stderr, and the exit code is 1; the others are deleted all the same.

    \b
    Examples:
      perdure workflow delete 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow delete --status cancelled --until 7d --dry-run
      perdure workflow delete --name import --until 2026-01-01 --yes
    """
    carry_out(
        Deed(
            verb=management.delete,
            find=lambda client: client.delete_many,
            done="deleted",
            question="Delete {}, with all that was recorded?",
        ),
        order,
    )


@click.command("prune")
@click.option(
    "--keep", type=age, metavar="DURATION", help="Keep what ended so short a time ago, such as 7d, whatever apps say."
)
@click.option("--name", type=filled, metavar="TEXT", help="Only workflows of that name.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one object.")
@database_options
def prune(keep: timedelta | None, name: str | None, dry_run: bool, json_wanted: bool) -> None:
    """Delete what has been over for longer than it is kept. Asks nothing.

    How long it is kept, apps and workflows say (retention=); 30 days where they don't. Workers do the same by
    themselves, now and then.

    \b
    Examples:
      perdure prune --dry-run
      perdure workflow prune --keep 7d --name import
    """
    count = with_client(lambda client: client.prune(keep=keep, name=name, dry_run=dry_run), migrate=False)
    if json_wanted:
        click.echo(as_json({"expired": count, "deleted": 0 if dry_run else count}))
    else:
        click.echo(f"{counted(count)} {'would be ' if dry_run else ''}deleted")

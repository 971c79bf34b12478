"""What a command does to workflows, and to which ones.

    ids, or what a filter finds -> (a question) -> done to each of them, in batches -> said of each

What is meant is said in full: nobody cancels everything by leaving an option out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import click

from perdure import management
from perdure.cli.clients import with_client
from perdure.cli.endings import FAILED, INTERRUPTED, Failure
from perdure.cli.filters import Filters, filter_options
from perdure.cli.options import database_options, on_terminal
from perdure.cli.tables import Column, print_array, show
from perdure.client import Client
from perdure.errors import PerdureError, WorkflowNotFound, WrongState
from perdure.management import BATCH, Verb
from perdure.model.statuses import Status
from perdure.session import Session
from perdure.store.arrays import Uuids

_Command = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """What a command does.

    Attributes:
        verb: Does it.
        find: The client's verb that finds those that a filter lets through.
        done: What they are then, for the summary.
        question: What is asked before it is done to what a filter found, with a place for how many; None: nothing.
        is_possible: Whether it can be done to a workflow whose status speaks against it.
    """

    verb: Callable[[Session], Verb]
    find: Callable[[Client], Callable[..., Awaitable[list[UUID]]]]
    done: str
    question: str | None = None
    is_possible: Callable[[Client, Any], Awaitable[bool]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """To which workflows it is done, and how."""

    ids: tuple[UUID, ...]
    filters: Filters
    everything: bool
    dry_run: bool
    yes: bool
    json_wanted: bool


def ordering(
    statuses: Sequence[Status],
    status_help: str,
    all_help: str,
    *,
    done_help: str = "For programs: one array of {id, done, error}.",
    asks: bool = False,
) -> Callable[[_Command], _Command]:
    """The arguments and options of an order; the command gets it as `order`.

    Args:
        statuses: Those that a filter can ask for.
        status_help: What it means to ask for one, and for none.
        all_help: What `--all` means.
        done_help: What `--json` means.
        asks: Whether there is a question, so that there is `--yes`.
    """
    options: list[Callable[[_Command], _Command]] = [
        click.argument("ids", type=click.UUID, metavar="[ID]...", nargs=-1),
        filter_options(statuses, status_help),
        click.option("--all", "everything", is_flag=True, help=all_help),
        click.option("--dry-run", is_flag=True, help="Only list them, with name and status."),
        click.option("--yes", is_flag=True, help="Don't ask.", hidden=not asks),
        click.option("--json", "json_wanted", is_flag=True, help=done_help),
        database_options,
    ]

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def ordered(
            *,
            ids: tuple[UUID, ...],
            filters: Filters,
            everything: bool,
            dry_run: bool,
            yes: bool,
            json_wanted: bool,
            **others: Any,
        ) -> None:
            order = Order(
                ids=tuple(dict.fromkeys(ids)),
                filters=filters,
                everything=everything,
                dry_run=dry_run,
                yes=yes,
                json_wanted=json_wanted,
            )
            command(order=order, **others)

        decorated: _Command = ordered
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def carry_out(deed: Deed, order: Order) -> None:
    """Do it; exits with code 1 where something couldn't be done."""
    _check(deed, order)
    ids = order.ids or with_client(lambda client: _found(client, deed, order), migrate=False)
    if order.dry_run:
        failed = _rehearse(deed, order, ids)
    elif ids and deed.question and not (order.ids or order.yes) and not _agreed(deed.question, len(ids)):
        raise Failure("nothing is done")
    else:
        failed = _act(deed, order, ids)
    if failed:
        sys.exit(FAILED)


async def waits_for_operator(client: Client, row: Any) -> bool:
    """Whether a waiting or running workflow is one that `resume` is for."""
    if row.status not in ("waiting", "running"):
        return False
    if row.waiting_for == "operator":
        return True
    return any(step.status == "parked" for step in await client.handle(row.id).steps())


def counted(count: int) -> str:
    """So many workflows, in words."""
    return f"{count} workflow{'' if count == 1 else 's'}"


def check_which(order: Order) -> None:
    """Raises what is wrong with the usage: it doesn't say, or says twice, which ones."""
    ways = [bool(order.ids), order.filters.is_given, order.everything]
    if not any(ways):
        raise click.UsageError("say which workflows: give ids, a filter such as --name or --status, or --all")
    if sum(ways) > 1:
        raise click.UsageError("give ids, a filter, or --all; they don't go together")


def _check(deed: Deed, order: Order) -> None:
    """The same, and whether there is somebody to ask."""
    check_which(order)
    if deed.question and not (order.ids or order.dry_run or order.yes or on_terminal(sys.stdin)):
        raise click.UsageError("there is no terminal to ask on; give --yes, or --dry-run to see what would be done")


async def _found(client: Client, deed: Deed, order: Order) -> tuple[UUID, ...]:
    """What the filter lets through, newest first."""
    arguments = await order.filters.arguments(client)
    return tuple(sorted(await deed.find(client)(**arguments, dry_run=True), reverse=True))


def _agreed(question: str, count: int) -> bool:
    """Whether somebody at the terminal says yes."""
    try:
        return click.confirm(question.format(counted(count)), err=True)
    except click.Abort:  # Ctrl-C, or the end of the input
        click.echo(err=True)
        sys.exit(INTERRUPTED)


def _batches(ids: Sequence[UUID]) -> Iterator[Sequence[UUID]]:
    for first in range(0, len(ids), BATCH):
        yield ids[first : first + BATCH]


# --- doing it ---------------------------------------------------------------------------------------------------------


def _act(deed: Deed, order: Order, ids: Sequence[UUID]) -> bool:
    """Do it, and say of each what became of it, a batch at a time; returns whether something failed."""
    outcomes: dict[UUID, PerdureError | None] = {}
    failed: list[UUID] = []

    async def use(client: Client) -> None:
        verb = deed.verb(client.session())
        for batch in _batches(ids):
            found = await management.apply(client.session(), batch, verb)
            for id in batch:
                error = outcomes[id] = found[id]
                if error is None:
                    if not order.json_wanted:
                        click.echo(str(id))
                elif order.ids or not isinstance(error, (WrongState, WorkflowNotFound)):
                    failed.append(id)
                    Failure.of(error).show()

    with_client(use, migrate=False)
    if order.json_wanted:
        print_array(
            {"id": str(id), "done": error is None, "error": None if error is None else str(error)}
            for id, error in outcomes.items()
        )
    elif not order.ids:
        done = sum(error is None for error in outcomes.values())
        left = len(outcomes) - done - len(failed)
        others = f"; {left} left: there is nothing to be done with {'it' if left == 1 else 'them'}" if left else ""
        click.echo(f"{counted(done)} {deed.done}{others}", err=True)
    return bool(failed)


# --- only saying what would be done -----------------------------------------------------------------------------------


def _rehearse(deed: Deed, order: Order, ids: Sequence[UUID]) -> bool:
    """List to what it would be done; returns whether there are ids to which it couldn't."""

    async def use(client: Client) -> dict[UUID, tuple[Any, PerdureError | None]]:
        verb = deed.verb(client.session())
        outcomes: dict[UUID, tuple[Any, PerdureError | None]] = {}
        for batch in _batches(ids):
            rows = {row.id: row for row in await client.session().database.fetch("describe", Uuids(batch))}
            for id in batch:
                outcomes[id] = rows.get(id), await _refusal(client, deed, verb, id, rows.get(id))
        return outcomes

    outcomes = with_client(use, migrate=False)
    if not order.ids:  # what has moved on since, or has nothing parked, isn't what the filter is for
        outcomes = {id: outcome for id, outcome in outcomes.items() if outcome[1] is None}
    refused = [error for _, error in outcomes.values() if error is not None]
    if order.json_wanted:
        print_array(
            {
                "id": str(id),
                "name": None if row is None else row.name,
                "status": None if row is None else row.status,
                "done": False,
                "error": None if error is None else str(error),
            }
            for id, (row, error) in outcomes.items()
        )
    else:
        possible = [row for row, error in outcomes.values() if error is None]
        show(
            [Column("id", whole=True), Column("name"), Column("status")],
            [[str(row.id), row.name, row.status] for row in possible],
        )
        click.echo(f"{counted(len(possible))} would be {deed.done}", err=True)
    for error in refused:
        Failure.of(error).show()
    return bool(refused)


async def _refusal(client: Client, deed: Deed, verb: Verb, id: UUID, row: Any) -> PerdureError | None:
    """Why it couldn't be done, as far as can be told without doing it."""
    if row is None:
        return WorkflowNotFound(id)
    reason = verb.refusals.get(row.status)
    if reason is None or (deed.is_possible is not None and await deed.is_possible(client, row)):
        return None
    return WrongState(id, row.status, reason)

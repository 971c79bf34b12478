"""Which workflows: the options of a filter, as one value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, cast

import click

from perdure.cli.options import filled, moment, pair
from perdure.client import Client
from perdure.model.statuses import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What the options say; what isn't given lets everything through."""

    status: str | None
    name: str | None
    queue: str | None
    key_prefix: str | None
    since: datetime | timedelta | None
    until: datetime | timedelta | None
    attributes: tuple[tuple[str, Any], ...]

    @property
    def is_given(self) -> bool:
        """Whether any of them is."""
        return any(getattr(self, field.name) not in (None, ()) for field in fields(self))

    async def arguments(self, client: Client) -> dict[str, Any]:
        """What is given, as the verbs of a client take it."""
        found = {
            "status": None if self.status is None else Status(self.status),
            "name": self.name,
            "queue": self.queue,
            "key_prefix": self.key_prefix,
            "since": await _instant(client, self.since),
            "until": await _instant(client, self.until),
            "attributes": dict(self.attributes) or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def filter_options(
    statuses: Sequence[Status] = tuple(Status), status_help: str = "Only those that stand there."
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a filter; the command gets them as `filters`.

    Args:
        statuses: Those that can be asked for.
        status_help: What it means to ask for one, and for none.
    """
    options = (
        click.option("--status", type=click.Choice([status.value for status in statuses]), help=status_help),
        click.option("--name", type=filled, metavar="TEXT", help="Only workflows of that name."),
        click.option("--queue", type=filled, metavar="TEXT", help="Only those of that queue."),
        click.option("--key-prefix", type=filled, metavar="TEXT", help="Only those whose key begins so."),
        click.option(
            "--since",
            type=moment,
            metavar="WHEN",
            help="Only those created then or later. WHEN is an instant such as 2026-01-31T12:00:00Z (local time if it "
            "has no offset), or a duration such as 90s, 1h or 2d: so long ago.",
        ),
        click.option("--until", type=moment, metavar="WHEN", help="Only those created before that."),
        click.option(
            "--attribute",
            "attributes",
            type=pair,
            metavar="NAME=VALUE",
            multiple=True,
            help="Only those with that attribute; the value is JSON, or else a text. Repeatable.",
        ),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def filtered(**values: Any) -> None:
            filters = Filters(**{field.name: values.pop(field.name) for field in fields(Filters)})
            command(filters=filters, **values)

        decorated: Callable[..., None] = filtered
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


async def _instant(client: Client, when: datetime | timedelta | None) -> datetime | None:
    """An instant; "so long ago" is counted from the database's now."""
    if not isinstance(when, timedelta):
        return when
    (clock,) = await client.session().database.fetch("clock")
    try:
        return cast("datetime", clock.now) - when
    except OverflowError:
        raise click.UsageError(f"{when.days} days ago there was no calendar; use a shorter duration") from None

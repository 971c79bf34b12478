"""What options and arguments look like: durations, instants, JSON, addresses, and which database is meant."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

import click

from perdure.config import Settings

F = TypeVar("F", bound=Callable[..., Any])

SCHEMA = "PERDURE_SCHEMA"
PATIENCE = timedelta(seconds=10)
"""People wait for commands, so they give up earlier than a program would."""

_LONGEST = timedelta(days=36_500)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_PART.pattern})+|\d+(?:\.\d+)?")


# --- which database ---------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Which database and schema the options name. None: they don't say."""

    database_url: str | None
    schema: str | None


def database_options(command: F) -> F:
    """`--database-url` and `--schema`, on a group or a command; the innermost one wins."""
    return _database_options(
        command,
        "A PostgreSQL URL. [env: PERDURE_DATABASE_URL; default: the embedded server]",
        "The schema that holds perdure's tables. [env: PERDURE_SCHEMA; default: perdure]",
    )


def app_database_options(command: F) -> F:
    """The same where there is an app, which has a database: the environment must not part it from its clients."""
    return _database_options(
        command,
        "A PostgreSQL URL. [default: the app's, else PERDURE_DATABASE_URL, else the embedded server]",
        "The schema that holds perdure's tables. [default: the app's]",
    )


def _database_options(command: F, url: str, schema: str) -> F:
    for name, metavar, text in (("--schema", "NAME", schema), ("--database-url", "URL", url)):
        command = click.option(name, metavar=metavar, expose_value=False, callback=_remember, help=text)(command)
    return command


def given() -> Target:
    """What the options of the command and its groups say; the environment isn't asked."""
    meta = click.get_current_context().meta
    return Target(meta.get("perdure.database_url"), meta.get("perdure.schema"))


def settings(**changes: Any) -> Settings:
    """The settings of a command that knows no app: options first, then the environment."""
    target = given()
    schema = target.schema or os.environ.get(SCHEMA) or "perdure"
    return Settings(database_url=target.database_url, schema=schema, connect_timeout=PATIENCE, pool_size=2, **changes)


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value:
        ctx.meta[f"perdure.{param.name}"] = value


def on_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sits there; None: it is closed."""
    return stream is not None and stream.isatty()


# --- values: each is a click type, a function that raises click.BadParameter ------------------------------------------


def duration(text: str) -> timedelta:
    """`20`, `20s`, `500ms`, `5m`, `1h`, `2d`, `1h30m`."""
    found = _duration_of(text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no duration; use one such as 20, 20s, 500ms, 5m or 1h30m")
    return found


def moment(text: str) -> datetime | timedelta:
    """An instant in ISO 8601 (local time if it has no offset), or a duration: so long ago."""
    ago = _duration_of(text)
    if ago is not None:
        return ago
    try:
        when = datetime.fromisoformat(text)
        return when if when.tzinfo is not None else when.astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{text!r} is no instant; use 2026-01-31T12:00:00Z, or a duration ago such as 1h"
        ) from None


def age(text: str) -> timedelta:
    """A duration with its unit: where a number could be taken for days, seconds would be a bad surprise."""
    if text.isascii() and text[-1:].isdigit():
        raise click.BadParameter(f"{text!r} has no unit; use one such as 7d, 12h or 0s")
    found = duration(text)
    if found > _LONGEST:
        raise click.BadParameter(f"{text!r} is longer than {_LONGEST.days} days; use a shorter one")
    return found


def filled(text: str) -> str:
    """A text that isn't empty: `--name "$NAME"` must not mean every name, or none, where NAME isn't set."""
    if not text:
        raise click.BadParameter("it is empty; leave the option out to let everything through")
    return text


def pair(text: str) -> tuple[str, Any]:
    """`name=value`; the value is JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is no pair; use name=value")
    try:
        return name, parsed(value)
    except ValueError:
        return name, value


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """`HOST:PORT`, `[::1]:PORT`, or `:PORT` for all interfaces."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is no address; use HOST:PORT, such as 127.0.0.1:8080 or :8080")
    return Address(host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port))


def parsed(text: str | bytes) -> Any:
    """JSON, as the standard has it.

    Raises:
        ValueError: It isn't.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _duration_of(text: str) -> timedelta | None:
    """The duration that a text means, if any; a bare number is seconds."""
    if not text.isascii() or _DURATION.fullmatch(text) is None:
        return None
    try:
        if text[-1].isdigit():
            return timedelta(seconds=float(text))
        return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text)))
    except OverflowError:
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    """`1e999` is a number, but none that can be kept; as a value of an option, it is some hexadecimal text."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large")
    return number

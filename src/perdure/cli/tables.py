"""Rows for people: a table on a terminal, plain columns elsewhere; and what a value looks like in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, cast
from uuid import UUID

import click
from rich.cells import cell_len

from perdure.errors import StepFailed

_STEP_FAILED = f"{StepFailed.__module__}.{StepFailed.__qualname__}"
_COLOURS = {"success": "green", "error": "red", "cancelled": "yellow", "running": "cyan", "waiting": "blue"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `whole`: never cut, however narrow the terminal is."""

    title: str
    whole: bool = False


def show(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(columns, clean)
    else:
        _line_up(columns, clean)


def _draw(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        width = max((cell_len(row[place]) for row in rows), default=0)
        table.add_column(column.title, no_wrap=column.whole, min_width=width if column.whole else None)
    for row in rows:
        table.add_row(
            *(
                Text(
                    cell, style=_COLOURS.get(cell, ""), overflow="ignore" if column.whole else "ellipsis", no_wrap=True
                )
                for column, cell in zip(columns, row, strict=True)
            )
        )
    Console().print(table, crop=False, no_wrap=True, overflow="ignore")


def _line_up(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    lines = [[column.title for column in columns], *rows]
    widths = [max(cell_len(line[place]) for line in lines) for place in range(len(columns))]
    click.echo(
        "\n".join(
            "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
    )


def styled(status: str) -> str:
    """A status in its colour, where there are colours."""
    return click.style(status, fg=_COLOURS.get(status))


def printable(text: str) -> str:
    """The text on one line, without what would move the cursor or worse: rows hold what anybody has put there."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def as_dict(row: Any) -> dict[str, Any]:
    """A row as plain data for JSON: instants in UTC."""
    return {field.name: _plain(getattr(row, field.name)) for field in fields(row)}


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as people read it: no escapes where none are needed."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def print_array(rows: Iterable[Mapping[str, Any]]) -> None:
    """One array for programs, one row a line."""
    lines = ",\n".join(map(as_json, rows))
    click.echo(f"[{lines}]")


def error_line(error: Any) -> str:
    """A recorded failure on one line: `shop.CardDeclined: no funds`."""
    record = error_record(error)
    if not record:
        return str(error)
    args = record.get("args")
    if record.get("type") == _STEP_FAILED and isinstance(args, list):
        return ": ".join(map(str, cast("Iterable[Any]", args[:2])))  # without the advice on how to catch it
    kind = str(record.get("type", "unknown")).removeprefix("builtins.")
    return f"{kind}: {record.get('message', '')}"


def error_record(error: Any) -> dict[str, Any]:
    """A recorded failure, or nothing where it isn't one."""
    return cast("dict[str, Any]", error) if isinstance(error, dict) else {}


def shortened(text: str, most: int = 60) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def local(when: datetime | None) -> str:
    """An instant, in local time."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}" if when is not None else ""


def length(duration: timedelta | None) -> str:
    """A duration, in two units at most."""
    if duration is None:
        return ""
    seconds = duration.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.value
        case UUID():
            return str(value)
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case _:
            return value

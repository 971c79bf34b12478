"""What the demo says: on a terminal with a progress bar, elsewhere in plain lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perdure.demo.stage import SCHEMA, Connection

_TENTHS = 10
_WIDTH_OF_A_LOG = 120


class Screen:
    """Says things."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._width = self._console.width if self._console.is_terminal else _WIDTH_OF_A_LOG

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """One line."""
        self._console.print(text, style=style)

    @contextmanager
    def progress(self, total: int) -> Generator[Callable[[int], None]]:
        """A bar while the block runs; it gives what tells how much is done."""
        if not self._console.is_terminal:
            yield self._lines(total)
            return
        columns = (TextColumn("workflows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task("", total=total)
            yield lambda done: progress.update(bar, completed=done)

    def _lines(self, total: int) -> Callable[[int], None]:
        said = 0

        def tell(done: int) -> None:
            nonlocal said
            if done * _TENTHS // total > said:
                said = done * _TENTHS // total
                self.say(f"  {done:,} of {total:,} workflows")

        return tell

    def query(
        self, connection: Connection, text: str, *, columns: Sequence[str] = (), most: int = 10, path: bool = False
    ) -> None:
        """A query and its answer.

        Args:
            connection: Where it runs.
            text: The query, as it is shown.
            columns: The columns to be shown, where they are too many.
            most: How many rows to show.
            path: Run it in the demo's schema, and show that, too.
        """
        shown = [f"SET search_path = {SCHEMA};"] if path else []
        for line in [*shown, f"{text};"]:
            self.say(f"  {line}", style="cyan")
        with connection.transaction():
            if path:
                connection.execute(f"SET LOCAL search_path = {SCHEMA}")
            cursor = connection.execute(text.encode())
        names = [column.name for column in cursor.description or ()]
        rows = cursor.fetchall()
        chosen = [names.index(name) for name in columns or names]
        for line in _table(
            [names[index] for index in chosen], [[row[index] for index in chosen] for row in rows[:most]]
        ):
            self.say(f"  {line}"[: self._width])
        left_out = f"; {len(chosen)} of {len(names)} columns" if rows and len(chosen) < len(names) else ""
        first = f"; the first {most}" if len(rows) > most else ""
        self.say(f"  ({len(rows)} row{'' if len(rows) == 1 else 's'}{first}{left_out})")


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """As psql shows it."""
    if not rows:
        return []
    texts = [[" ".join(_text(value).split()) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (names, *texts)]
    return [lines[0], "-+-".join("-" * width for width in widths), *lines[1:]]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)

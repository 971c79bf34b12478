"""The connection that a check looks through."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from perdure.store.database import Connection, Database
from perdure.store.statements import Statement, in_schema, quoted


class Look:
    """A database that is looked at; nothing that goes through here changes anything."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self.database = database
        self.connection = connection
        self.schema = database.settings.schema

    @property
    def quoted(self) -> str:
        """The name of the schema, as SQL has it."""
        return quoted(self.schema)

    async def rows(self, sql: str, *params: object) -> Sequence[Any]:
        """The rows of a query; `perdure.` in it is the schema."""
        statement = Statement(name="doctor", text=in_schema(sql, self.schema).encode())
        return await self.database.execute(self.connection, statement, params)


def ago(seconds: float) -> str:
    """So long, in the unit that fits: `40 s`, `12 min`, `3 h`, `5 d`."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(count: int, what: str) -> str:
    """`1 workflow`, `2 workflows`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


MINUTE = timedelta(minutes=1).total_seconds()

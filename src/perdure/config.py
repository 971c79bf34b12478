"""What can be set: one frozen value, made from arguments and the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

from perdure.errors import ConfigurationError

DATABASE_URL = "PERDURE_DATABASE_URL"
KEEP = timedelta(days=30)
"""How long a workflow is kept after its end, where nobody says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an app or a client talks to its database.

    Attributes:
        database_url: A PostgreSQL URL or conninfo string. None: `PERDURE_DATABASE_URL`, else the embedded server.
        schema: The schema that holds perdure's tables; two apps in one database don't meet if theirs differ.
        connect_timeout: For how long a verb tries to reach the database before it raises `DatabaseUnavailable`.
        statement_timeout: After how long a statement without an answer is given up, with its connection.
        pool_size: How many connections may be open at once, beside those of a worker.
        max_payload: The largest payload, in bytes of JSON.
        max_recoveries: After how many lost workers in a row, without any progress, a workflow ends in error.
        migrate: Whether a missing or older schema is brought up to date at first use.
        read_only: Whether a server that takes no writes (a standby) will do: for tools that only look.
    """

    database_url: str | None = field(default=None, repr=False)  # it may hold a password
    schema: str = "perdure"
    connect_timeout: timedelta = timedelta(seconds=30)
    statement_timeout: timedelta = timedelta(seconds=30)
    pool_size: int = 4
    max_payload: int = 16 * 1024 * 1024
    max_recoveries: int = 10
    migrate: bool = field(default_factory=lambda: os.environ.get("PERDURE_MIGRATE", "on") not in ("off", "0", "no"))
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.schema or len(self.schema.encode()) > 63 or "\0" in self.schema:
            raise ConfigurationError(f"schema={self.schema!r} is no name of a schema; use 1 to 63 bytes")
        if self.pool_size < 1:
            raise ConfigurationError(f"pool_size={self.pool_size} leaves no connection; use 1 or more")

    def url(self) -> str | None:
        """The URL that was set, here or in the environment. None: nobody set one."""
        return self.database_url or os.environ.get(DATABASE_URL) or None

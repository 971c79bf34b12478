"""The way to PostgreSQL: connections, their capabilities, and what an error of theirs means.

A `Database` belongs to one event loop. It opens connections when they are needed, keeps a few, and closes what stays
idle; nothing in it runs in the background. Two ways to run a statement:

- `attempt` tries once. What it raises says what is known: `Interrupted` (try again; `outcome_unknown` tells whether it
  may have taken effect), `ConfigurationError` (trying again won't help), or the error of the database about the data.
- `fetch` tries until the answer is there or its patience is at an end (`DatabaseUnavailable`). So it takes only
  statements that are safe to send again: a lost request and a lost acknowledgement look the same.

Every statement is bounded by a timer on this side: when it fires, the socket is shut, which ends a wait on a black hole
at once, where cancelling would wait for the server. A connection on which anything went wrong is thrown away.

Named (prepared) statements are used on direct connections only: behind a transaction pooler they may run another
client's statement. A pooler shows in a backend pid that differs from the one that the driver was told at connect.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, waiting
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row

from perdure import embedded, telemetry
from perdure.config import Settings
from perdure.errors import ConfigurationError, DatabaseUnavailable, SchemaError
from perdure.store import arrays, instants, migrations
from perdure.store.pauses import backoff
from perdure.store.programs import Program
from perdure.store.statements import Statement, statements

Row = Any
"""A named tuple: columns are read by name."""

Connection = AsyncConnection[Row]
Connect = Callable[[str], Awaitable[Connection]]

T = TypeVar("T")


class Ensure(Protocol):
    """What is done about the schema at the first connection: `migrations.ensure`, or what a tool does instead."""

    async def __call__(self, connection: Connection, schema: str, *, apply: bool) -> object: ...


OLDEST_SERVER = 130_000
_IDLE_SECONDS = 5.0
_WAIT_SECONDS = 0.1
_CONNECT_SECONDS = 5
_REFUSED = ("28", "3D", "42501", "0P")  # authentication, no such database, missing rights, no such role
_TRY_AGAIN = ("08", "40001", "40003", "40P01", "53", "57", "58", "25006")


class Interrupted(Exception):
    """A statement came to no end, for a reason that lies outside it: try again.

    Attributes:
        reason: What happened, in a few words.
        outcome_unknown: The statement may have taken effect.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool) -> None:
        super().__init__(reason, outcome_unknown)
        self.reason = reason
        self.outcome_unknown = outcome_unknown

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the server and the way to it can do; found out at the first connection."""

    server_version: int
    pooler: bool

    @property
    def named_statements(self) -> bool:
        return not self.pooler


class _Connection(AsyncConnection[Row]):
    """A connection that is closed when a statement on it is given up.

    psycopg would ask the server to cancel it. That takes a connection of its own, and PgBouncer up to 1.18 may die of
    it ("bad client state"), for all its clients. Whether the statement took effect isn't known either way.
    """

    async def wait(self, gen: PQGen[T], interval: float = _WAIT_SECONDS, timeout: float | None = None) -> T:
        limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}  # psycopg 3.2 has none
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, **limit)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise


class Database:
    """A bounded set of connections to one database, for one event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        connect: Connect | None = None,
        pool_size: int | None = None,
        ensure: Ensure = migrations.ensure,
    ) -> None:
        self.settings = settings
        self.statements = statements(settings.schema)
        self.capabilities: Capabilities | None = None
        self.url: str | None = None
        self._open = connect or _connect
        self._ensure = ensure
        self._idle: list[tuple[float, Connection]] = []
        self._slots = asyncio.Semaphore(pool_size or settings.pool_size)
        self._introduction = asyncio.Lock()
        self._trimming: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- statements ------------------------------------------------------------------------------------------------

    async def attempt(self, name: str, /, *params: object) -> Sequence[Row]:
        """Run one statement, once."""
        async with self.connection() as connection:
            return await self.execute(connection, self.statements[name], params)

    async def fetch(self, name: str, /, *params: object, patience: timedelta | None = None) -> Sequence[Row]:
        """Run one statement that is safe to send again, until it is answered.

        Raises:
            DatabaseUnavailable: It wasn't answered for as long as `patience` (by default `connect_timeout`).
        """
        return await self.persist(lambda: self.attempt(name, *params), patience=patience)

    async def reach(self, who: str) -> None:
        """Wait until the database can be reached, for ever; says so when that takes long.

        Raises:
            ConfigurationError: It refuses us.
        """
        told = False
        for pause in backoff():
            try:
                await self.attempt("clock")
            except Interrupted as interruption:
                if not told:
                    telemetry.emit(telemetry.DatabaseLost(component=who, reason=interruption.reason))
                told = True
                await asyncio.sleep(pause)
            else:
                if told:
                    telemetry.emit(telemetry.DatabaseBack(component=who))
                return

    async def prepare(self) -> None:
        """See to it that the schema is there: before a caller's own connection writes to it."""
        if self.capabilities is None:
            await self.fetch("clock")

    def widen(self, connections: int) -> None:
        """Allow so many more at once: a worker moves in."""
        for _ in range(connections):
            self._slots.release()

    async def persist(self, attempt: Callable[[], Awaitable[T]], *, patience: timedelta | None = None) -> T:
        """Repeat `attempt` while it is interrupted, with growing pauses, for as long as the patience lasts."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (patience or self.settings.connect_timeout).total_seconds()
        outcome_unknown = False
        for pause in backoff():
            try:
                return await attempt()
            except Interrupted as interruption:
                outcome_unknown |= interruption.outcome_unknown
                if loop.time() + pause >= deadline:
                    raise DatabaseUnavailable(interruption.reason, outcome_unknown) from interruption
            await asyncio.sleep(pause)
        raise AssertionError("backoff never ends")

    async def execute(self, connection: Connection, statement: Statement, params: Sequence[object]) -> Sequence[Row]:
        """Run a statement on a connection that the caller holds; the client-side timeout applies."""
        timeout = self.settings.statement_timeout.total_seconds()
        guard = asyncio.get_running_loop().call_later(timeout, _sever, connection)
        try:
            cursor = connection.cursor(binary=True)
            await cursor.execute(statement.text, params or None)
            return await cursor.fetchall() if cursor.description else ()
        except psycopg.Error as error:
            raise self._meaning(error, connection, in_flight=True) from error
        finally:
            guard.cancel()

    async def run_program(self, program: Program[T], *, transaction: bool) -> T:
        """Run a program on one connection, once; in a transaction of its own, or each statement by itself."""
        async with self.connection() as connection:
            try:
                if not transaction:
                    return await self._drive(connection, program)
                async with connection.transaction():
                    return await self._drive(connection, program)
            except psycopg.Error as error:
                raise self._meaning(error, connection, in_flight=True) from error

    async def _drive(self, connection: Connection, program: Program[T]) -> T:
        try:
            name, params = next(program)
            while True:
                name, params = program.send(await self.execute(connection, self.statements[name], params))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    # --- connections -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection in autocommit. It comes back to the pool if it is as good as before, else it is thrown away."""
        if self._closed:
            raise Interrupted("the pool is closed", outcome_unknown=False)
        async with self._slots:
            connection = self._idle.pop()[1] if self._idle else await self.open()
            healthy = False
            try:
                yield connection
                healthy = True
            finally:
                self._take_back(connection, healthy)

    async def open(self) -> Connection:
        """A new connection, outside the pool: the caller closes it."""
        if self.url is None:
            self.url = await asyncio.to_thread(_resolve, self.settings)
        try:
            connection = await self._open(self.url)
        except (psycopg.Error, OSError) as error:
            raise self._meaning(error, None, in_flight=False) from error
        try:
            async with self._introduction:
                if self.capabilities is None:
                    self.capabilities = await self._introduce(connection)
        except BaseException:
            self._discard(connection)
            raise
        connection.prepare_threshold = 1 if self.capabilities.named_statements else None
        return connection

    async def close(self) -> None:
        """Close all connections; the database can't be used any more."""
        self._closed = True
        if self._trimming:
            self._trimming.cancel()
        idle, self._idle = self._idle, []
        for _, connection in idle:
            self._discard(connection)
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CONNECT_SECONDS)

    async def _introduce(self, connection: Connection) -> Capabilities:
        """Find out what this is, and bring the schema up to date."""
        connection.prepare_threshold = None
        (probe,) = await self.execute(connection, self.statements["probe"], ())
        if probe.server_version < OLDEST_SERVER:
            raise ConfigurationError(
                f"the server is PostgreSQL {probe.server_version // 10_000}; perdure needs 13 or later"
            )
        if probe.read_only == "on" and not self.settings.read_only:
            raise Interrupted("the server is read-only (a standby?)", outcome_unknown=False)
        try:
            await self._ensure(connection, self.settings.schema, apply=self.settings.migrate)
        except psycopg.Error as error:
            raise self._meaning(error, connection, in_flight=True) from error
        pooler = connection.pgconn.backend_pid != probe.backend_pid
        return Capabilities(server_version=probe.server_version, pooler=pooler)

    def _take_back(self, connection: Connection, healthy: bool) -> None:
        idle = healthy and not connection.closed and connection.pgconn.transaction_status == TransactionStatus.IDLE
        if not idle or self._closed:
            self._discard(connection)
            return
        loop = asyncio.get_running_loop()
        self._idle.append((loop.time(), connection))
        if len(self._idle) > 1 and self._trimming is None:
            self._trimming = loop.call_later(_IDLE_SECONDS, self._trim)

    def _trim(self) -> None:
        """Close what nobody has used for a while, but for one."""
        self._trimming = None
        loop = asyncio.get_running_loop()
        while len(self._idle) > 1 and self._idle[0][0] <= loop.time() - _IDLE_SECONDS:
            self._discard(self._idle.pop(0)[1])
        if len(self._idle) > 1:
            self._trimming = loop.call_later(_IDLE_SECONDS, self._trim)

    def _discard(self, connection: Connection) -> None:
        """Close a connection without waiting for it: it may lead into a black hole."""

        async def close() -> None:
            with suppress(psycopg.Error, OSError):
                await connection.close()

        task = asyncio.ensure_future(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- what an error means ---------------------------------------------------------------------------------------

    def _meaning(self, error: BaseException, connection: Connection | None, *, in_flight: bool) -> Exception:
        """What is to be done about an error of the driver: by sqlstate, then by the state of the connection."""
        state = getattr(error, "sqlstate", None) or ""
        reason = _one_line(error)
        if state.startswith(_REFUSED):
            return ConfigurationError(f"{reason}; check the URL, the role and its rights")
        if state in ("42P01", "3F000", "42883", "42703") and connection is not None:
            return SchemaError(
                f"schema {self.settings.schema!r} is not complete: {reason}; "
                "run 'perdure migrate', or restore what was dropped"
            )
        if connection is None:
            return _refusal(reason) or Interrupted(reason, outcome_unknown=False)
        if connection.closed or connection.pgconn.status != psycopg.pq.ConnStatus.OK:
            return Interrupted(reason, outcome_unknown=in_flight)
        if state.startswith(_TRY_AGAIN):
            return Interrupted(reason, outcome_unknown=state in ("40003",) or state.startswith("08"))
        return error if isinstance(error, Exception) else Interrupted(reason, outcome_unknown=True)


def _resolve(settings: Settings) -> str:
    """The conninfo string, with what perdure wants where the user has said nothing."""
    url = settings.url() or embedded.embedded_url()
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        # The driver's words may quote the URL, and a password with it.
        raise ConfigurationError(
            "the database URL can't be read; use postgresql://user:password@host:5432/database, "
            "with special characters percent-encoded"
        ) from None
    defaults: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "fallback_application_name": "perdure"}
    if not settings.read_only and any("," in str(given.get(name, "")) for name in ("host", "hostaddr")):
        defaults["target_session_attrs"] = "read-write"
    return make_conninfo(url, **{name: value for name, value in defaults.items() if name not in given})


async def _connect(url: str) -> Connection:
    connection = await _Connection.connect(
        url, autocommit=True, cursor_factory=AsyncRawCursor, row_factory=namedtuple_row, prepare_threshold=None
    )
    arrays.register(connection.adapters)
    instants.register(connection.adapters)
    connection.add_notice_handler(_on_notice)
    return connection


def _on_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
    telemetry.emit(telemetry.DatabaseNotice(message=diagnostic.message_primary or ""))


def _sever(connection: Connection) -> None:
    """Shut the socket under a statement that takes too long: the driver sees the end of the connection at once."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def _refusal(reason: str) -> ConfigurationError | None:
    """A connection that was refused for good: libpq has no sqlstate for it, only the server's words."""
    text = reason.lower()
    if "password" in text or "pg_hba" in text or "authentication" in text:
        return ConfigurationError(f"{reason}; check user and password in the database URL")
    if "fatal" in text and "does not exist" in text:
        return ConfigurationError(f"{reason}; create it, or correct the database URL")
    if "temporary failure" in text:
        return None
    if "could not translate host name" in text or "invalid port" in text or "failed to resolve host" in text:
        return ConfigurationError(f"{reason}; check host and port in the database URL")
    return None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

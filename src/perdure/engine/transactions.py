"""Transactional steps: the step's writes and its checkpoint commit in one transaction: exactly one effect.

    barrier -> BEGIN (the user's connection) -> body -> turn -> fence -> checkpoint -> COMMIT -> handed to the code

The fence is the first of the last two statements: `SELECT ... FOR SHARE` of the entry by (worker id, epoch). From then
on a recovery waits for this transaction, or this transaction finds the entry gone and rolls back. The checkpoint's
primary key does the rest: of two transactions for one step at most one commits.

- The process dies before COMMIT reached the server: the server rolls back; the body runs again elsewhere.
- The acknowledgement of COMMIT is lost: whether it took effect is read in a new transaction, by (worker id, epoch) of
  the checkpoint. Not there: the body runs again; should the first one commit after all, the second one's checkpoint
  collides, it rolls back, and the first one's outcome counts.
- The owner freezes in the middle: `idle_in_transaction_session_timeout` (one lease) ends its transaction, so that it
  doesn't hold up a take-over for longer. The process goes on: the body runs again, which is no failed attempt; a body
  that does it a few times in a row has itself to blame, and that is its failure.
- Two transactions in conflict (40001, 40P01): the body runs again, which is no failed attempt.

The turn is kept until the commit is certain: a position is drawn before it, and nothing may be delivered out of order.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row

from perdure.authoring.steps import Transaction
from perdure.engine.calls import Call
from perdure.errors import ConfigurationError, RunEnded
from perdure.store.database import Database, Interrupted
from perdure.store.pauses import backoff
from perdure.store.statements import SHARD

_CONFLICT = ("40001", "40P01")
_IDLED = "25P03"
_MOST_IDLED = 2
_ISOLATION = {
    "read committed": sql.SQL("READ COMMITTED"),
    "repeatable read": sql.SQL("REPEATABLE READ"),
    "serializable": sql.SQL("SERIALIZABLE"),
}


class Transactions:
    """Runs the bodies of transactional steps on the connections that their `using=` makes."""

    def __init__(self, database: Database, version: str, lease: timedelta) -> None:
        self._database = database
        self._statements = database.statements
        self._version = version
        self._idle_limit = f"{int(lease.total_seconds() * 1000)}ms"
        self._installation: UUID | None = None
        self._checked: set[str] = set()

    async def attempt(self, call: Call, began: float) -> Any:
        """One attempt: its value, recorded. What the body raises is raised, after the rollback."""
        idled = 0
        for pause in backoff():
            try:
                return await self._transaction(call, began)
            except psycopg.Error as error:
                found, value = await self._recorded(call)
                if found:
                    return value
                idled += error.sqlstate == _IDLED
                if not _is_worth_repeating(error) or idled > _MOST_IDLED:
                    raise
            await asyncio.sleep(pause)
            if call.run.over:
                raise RunEnded
        raise AssertionError("backoff never ends")

    async def _transaction(self, call: Call, began: float) -> Any:
        transaction = call.step.transaction
        assert transaction is not None
        async with AsyncExitStack() as stack:
            connection = await stack.enter_async_context(transaction.using())
            self._check(call.step.name, connection)
            await stack.enter_async_context(connection.transaction())
            await self._prepare(connection, transaction, call.step.name)
            value = await call.body((connection, *call.args))
            text, value = call.settled(value)
            position = await call.run.delivery.turn()
            with call.run.delivery.held_turn():
                await self._record(connection, call, position, text, began)
                await stack.aclose()  # COMMIT
        call.told("success")
        return value

    def _check(self, name: str, connection: Any) -> None:
        if not isinstance(connection, AsyncConnection):
            raise ConfigurationError(
                f"using= of step {name!r} makes a {type(connection).__name__}; it must make a psycopg.AsyncConnection"
            )
        if connection.info.transaction_status != TransactionStatus.IDLE:
            raise ConfigurationError(
                f"using= of step {name!r} makes a connection that is in a transaction already; let perdure begin it"
            )

    async def _prepare(self, connection: AsyncConnection[Any], transaction: Transaction, name: str) -> None:
        if transaction.isolation is not None:
            if transaction.isolation.lower() not in _ISOLATION:
                raise ConfigurationError(
                    f"isolation={transaction.isolation!r} of step {name!r} is none; use {', '.join(sorted(_ISOLATION))}"
                )
            level = _ISOLATION[transaction.isolation.lower()]
            await connection.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL {}").format(level))
        limit = sql.Literal(self._idle_limit)
        await connection.execute(sql.SQL("SET LOCAL idle_in_transaction_session_timeout = {}").format(limit))
        if name not in self._checked:
            await self._check_installation(connection, name)
            self._checked.add(name)

    async def _check_installation(self, connection: AsyncConnection[Any], name: str) -> None:
        """Once a step: its connection must lead to the tables that this app writes to."""
        if self._installation is None:
            (own,) = await self._database.fetch("installation", SHARD)
            self._installation = own.id
        problem = ConfigurationError(
            f"using= of step {name!r} connects to another database than the app; "
            "a transactional step commits together with its checkpoint, so both must be one"
        )
        try:
            rows = await self._run(connection, "installation", SHARD)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege) as error:
            raise problem from error
        if not rows or rows[0].id != self._installation:
            raise problem

    async def _record(
        self, connection: AsyncConnection[Any], call: Call, position: int, text: str, began: float
    ) -> None:
        """The fence and the checkpoint: the last two statements before the commit."""
        run = call.run
        held = await self._run(connection, "fence", SHARD, run.worker_id, run.id, run.epoch)
        if not held or run.over:
            run.lost("another worker or an operator has taken it")
            raise RunEnded
        row = call.checkpoint(position, "success", text, began)
        await self._run(
            connection, "record_in_transaction", SHARD, run.worker_id, run.id, run.epoch, self._version, row.key,
            row.position, row.payload, row.args_hash, row.attempts, row.duration,
        )  # fmt: skip

    async def _run(self, connection: AsyncConnection[Any], name: str, *params: object) -> list[Any]:
        cursor = AsyncRawCursor(connection, row_factory=namedtuple_row)
        await cursor.execute(self._statements[name].text, params)
        return await cursor.fetchall() if cursor.description else []

    async def _recorded(self, call: Call) -> tuple[bool, Any]:
        """Whether this run's checkpoint is there after all, and its value; somebody else's ends this run."""
        run = call.run
        rows: Any = ()
        for pause in backoff():
            try:
                rows = await self._database.attempt("recorded_step", SHARD, run.id, call.key)
                break
            except (Interrupted, ConfigurationError):
                await asyncio.sleep(pause)
                if run.over:
                    raise RunEnded from None
        if not rows:
            return False, None
        (row,) = rows
        if (row.worker_id, row.epoch) != (run.worker_id, run.epoch):
            run.lost(f"step {call.key!r} was recorded by another worker")
            raise RunEnded
        return True, call.step.shape.load(run.decoded(row.payload))


def _is_worth_repeating(error: psycopg.Error) -> bool:
    """A conflict with another transaction, or a process or a connection that failed: no failure of the step."""
    if error.sqlstate is not None:
        return error.sqlstate in (*_CONFLICT, _IDLED) or error.sqlstate.startswith(("08", "57P"))
    return isinstance(error, psycopg.OperationalError)

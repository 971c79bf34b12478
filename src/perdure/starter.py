"""Starting workflows: what many callers start at the same time goes to the database in one statement.

Two lanes, each sends one batch at a time while the next one gathers; of a crowd, the plain one sends two:

- the plain one: rows, inputs and entries are only inserted, so nothing can be in its way;
- the keyed one, for starts under a key or at a later time: they may meet somebody else's open transaction that holds a
  key, so they have a connection and a lock timeout of their own, and who waits, waits alone.

A start is acknowledged when it is committed. Sent again after a lost answer, it recognises its own by its id. A row
that the database refuses is separated by halving; only its caller gets the error. Where a worker of this process may
run it at once (`Local.reserve`), the entry is born claimed, and the run begins when the start is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, cast
from uuid import UUID

import psycopg

from perdure.config import Settings
from perdure.errors import ConfigurationError, DatabaseUnavailable, KeyConflict, PerdureError, SerializationError
from perdure.model.records import Claim
from perdure.store import programs
from perdure.store.arrays import Uuids
from perdure.store.database import Database, Interrupted
from perdure.store.pauses import backoff
from perdure.store.programs import NewWorkflow, Started
from perdure.store.statements import SHARD

_MOST_PLAIN = 1000
_CROWD = 200  # fewer aren't worth a statement more
_MOST_KEYED = 200
_LOCK_TIMEOUT = "200ms"
_CLOSING_SECONDS = 2.0


class Local(Protocol):
    """A worker in this process, on this loop."""

    @property
    def worker_id(self) -> UUID | None: ...
    def reserve(self, queue: str, name: str, id: UUID) -> bool:
        """Whether this workflow may be claimed at its birth; the slot is taken if so."""
        ...

    def launch(self, claims: Sequence[Claim]) -> None:
        """Run what was claimed at its birth."""

    def forget(self, ids: Sequence[UUID], *, in_doubt: bool) -> None:
        """Slots that were reserved and aren't needed; in doubt: the entries may be ours all the same."""


class _Call:
    """A caller's starts: one future for all of them, since there may be thousands."""

    __slots__ = ("done", "left")

    def __init__(self, count: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = count


@dataclass(slots=True, eq=False)
class _Waiting:
    """A start under way."""

    new: NewWorkflow
    call: _Call
    deadline: float
    outcome: Started | Exception | None = None
    outcome_unknown: bool = False

    def tell(self, outcome: Started | Exception) -> None:
        """What has come of it; the first time counts."""
        call = self.call
        if self.outcome is None:
            self.outcome = outcome
            call.left -= 1
            if not (call.left or call.done.done()):
                call.done.set_result(None)


class Starter:
    """Starts workflows, in batches."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        on_started: Callable[[set[str]], None],
        on_timer: Callable[[], None],
    ) -> None:
        self._database = database
        self._patience = settings.connect_timeout.total_seconds()
        self._on_started = on_started
        self._on_timer = on_timer
        self._plain = _Lane(self._send_plain, _MOST_PLAIN, width=2)
        self._keyed = _Lane(self._send_keyed, _MOST_KEYED)
        self._apart: set[asyncio.Task[None]] = set()
        self._one_apart = asyncio.Semaphore()
        self.local: Local | None = None

    async def start(self, news: Sequence[NewWorkflow]) -> list[Started]:
        """Start these; returns when all are durable.

        Raises:
            KeyConflict: A key is taken, and the start asked to be told.
            DatabaseUnavailable: No answer for `connect_timeout`.
            SerializationError: The database refuses a row.
        """
        if not news:
            return []
        deadline = asyncio.get_running_loop().time() + self._patience
        call = _Call(len(news))
        all = [_Waiting(new, call, deadline) for new in news]
        for one in all:
            (self._plain if one.new.is_plain else self._keyed).put(one)
        await call.done
        started: list[Started] = []
        for one in all:
            if not isinstance(one.outcome, Started):
                assert one.outcome is not None
                raise one.outcome
            started.append(one.outcome)
        return started

    async def close(self) -> None:
        """Nothing new; what is under way is awaited briefly."""
        await self._plain.close()
        await self._keyed.close()
        for task in self._apart:
            task.cancel()

    # --- the plain lane --------------------------------------------------------------------------------------------

    async def _send_plain(self, waiting: list[_Waiting]) -> None:
        local = self.local
        if local is None:
            return await self._insert(waiting, None)
        born_claimed: list[_Waiting] = []
        others: list[_Waiting] = []
        for one in waiting:
            is_reserved = local.reserve(one.new.queue, one.new.name, one.new.id)
            (born_claimed if is_reserved else others).append(one)
        if born_claimed:
            try:
                await self._insert(born_claimed, local)
            except BaseException:
                local.forget([one.new.id for one in born_claimed], in_doubt=True)
                raise
        if others:
            await self._insert(others, None)
        return None

    async def _insert(self, waiting: list[_Waiting], local: Local | None) -> None:
        """Insert these, or find out which can't be; each is told."""
        in_doubt = False
        for pause in backoff():
            worker_id = local.worker_id if local is not None else None
            news = [one.new for one in waiting]
            try:
                if in_doubt and await self._are_there(news):
                    rows: Sequence[Any] = ()
                else:
                    rows = await self._database.attempt("start", *programs.start_params(news, worker_id))
                return self._inserted(waiting, local, worker_id, rows, in_doubt=in_doubt)
            except Interrupted as interruption:
                in_doubt |= interruption.outcome_unknown
                waiting = self._give_up(waiting, interruption, local)
            except psycopg.errors.UniqueViolation:
                if not in_doubt:
                    raise  # two equal ids: the client's clock and its random numbers are broken
            except psycopg.Error as error:
                if local is not None:
                    local.forget([one.new.id for one in waiting], in_doubt=in_doubt)
                return await self._halve(waiting, error)
            except ConfigurationError as error:
                if local is not None:
                    local.forget([one.new.id for one in waiting], in_doubt=in_doubt)
                return _tell_all(waiting, error)
            if not waiting:
                return None
            await asyncio.sleep(pause)
        raise AssertionError("backoff never ends")

    async def _halve(self, waiting: list[_Waiting], error: psycopg.Error) -> None:
        if len(waiting) == 1:
            return _tell_all(waiting, _refused(waiting[0].new, error))
        middle = len(waiting) // 2
        await self._insert(waiting[:middle], None)
        await self._insert(waiting[middle:], None)
        return None

    async def _are_there(self, news: Sequence[NewWorkflow]) -> bool:
        """Whether a start without an answer took effect: it is one transaction, so any one of its rows tells."""
        return bool(await self._database.attempt("started", SHARD, Uuids([news[0].id])))

    def _inserted(
        self,
        waiting: list[_Waiting],
        local: Local | None,
        worker_id: UUID | None,
        rows: Sequence[Any],
        *,
        in_doubt: bool,
    ) -> None:
        running: dict[UUID, datetime] = {row.workflow_id: row.started_at for row in rows}
        claims: list[Claim] = []
        pending: list[NewWorkflow] = []
        for one in waiting:
            started_at = running.get(one.new.id)
            if worker_id is None or started_at is None:
                pending.append(one.new)
            else:
                claims.append(_claim(one.new, worker_id, started_at))
        if local is not None:
            # All of them, where its lease has ended since they were sent first: the slots are free again.
            local.forget([new.id for new in pending], in_doubt=in_doubt)
            local.launch(claims)
        if pending:
            self._on_started({new.queue for new in pending})
        for one in waiting:
            one.tell(Started(id=one.new.id, started=True))

    def _give_up(self, waiting: list[_Waiting], interruption: Interrupted, local: Local | None) -> list[_Waiting]:
        """Tell those whose patience is at an end; returns the others."""
        now = asyncio.get_running_loop().time()
        for one in waiting:
            one.outcome_unknown |= interruption.outcome_unknown
        late = [one for one in waiting if one.deadline <= now]
        for one in late:
            _tell_all([one], DatabaseUnavailable(interruption.reason, one.outcome_unknown))
        if late and local is not None:
            local.forget([one.new.id for one in late], in_doubt=True)
        return [one for one in waiting if one.deadline > now]

    # --- the keyed lane --------------------------------------------------------------------------------------------

    async def _send_keyed(self, waiting: list[_Waiting]) -> None:
        for pause in backoff():
            try:
                outcomes = await self._start_keyed([one.new for one in waiting])
            except Interrupted as interruption:
                waiting = self._give_up(waiting, interruption, None)
            except psycopg.errors.LockNotAvailable:
                if len(waiting) > 1:
                    return await self._halve_keyed(waiting)
                return self._wait_apart(waiting[0])
            except psycopg.Error as error:
                if len(waiting) > 1:
                    return await self._halve_keyed(waiting)
                return _tell_all(waiting, _refused(waiting[0].new, error))
            except ConfigurationError as error:
                return _tell_all(waiting, error)
            else:
                return self._keyed_started(waiting, outcomes)
            if not waiting:
                return None
            await asyncio.sleep(pause)
        raise AssertionError("backoff never ends")

    async def _halve_keyed(self, waiting: list[_Waiting]) -> None:
        """Side by side: the half that waits for somebody must not hold up the other."""
        middle = len(waiting) // 2
        await asyncio.gather(self._send_keyed(waiting[:middle]), self._send_keyed(waiting[middle:]))

    def _wait_apart(self, one: _Waiting) -> None:
        """Its key is held by a transaction that somebody leaves open: it waits beside the lane, and so alone."""
        task = asyncio.ensure_future(self._wait_for_key(one))
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)

    async def _wait_for_key(self, one: _Waiting) -> None:
        try:
            await self._persist_for_key(one)
        except asyncio.CancelledError:
            _cancel_all([one])
            raise

    async def _persist_for_key(self, one: _Waiting) -> None:
        reason = f"key {one.new.key!r} is held by a transaction that somebody leaves open"
        for pause in backoff():
            await asyncio.sleep(pause)
            try:
                async with self._one_apart:  # all who wait so hold one connection, for a moment each
                    outcomes = await self._start_keyed([one.new])
            except psycopg.errors.LockNotAvailable:
                interruption = Interrupted(reason, outcome_unknown=False)
            except Interrupted as error:
                interruption = error
            except psycopg.Error as error:
                return _tell_all([one], _refused(one.new, error))
            except ConfigurationError as error:
                return _tell_all([one], error)
            else:
                return self._keyed_started([one], outcomes)
            if not self._give_up([one], interruption, None):
                return None
        raise AssertionError("backoff never ends")

    async def _start_keyed(self, news: list[NewWorkflow]) -> list[Started | KeyConflict]:
        program = programs.start_keyed(news, lock_timeout=_LOCK_TIMEOUT)
        replaces = any(new.on_conflict == "replace_finished" for new in news)
        return await self._database.run_program(program, transaction=replaces)

    def _keyed_started(self, waiting: list[_Waiting], outcomes: list[Started | KeyConflict]) -> None:
        queues: set[str] = set()
        for one, outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, KeyConflict):
                _tell_all([one], outcome)
                continue
            if outcome.started:
                queues.add(one.new.queue)
                if one.new.delay is not None or one.new.start_at is not None or one.new.timeout is not None:
                    self._on_timer()
            one.tell(outcome)
        if queues:
            self._on_started(queues)


class _Lane:
    """A task that sends one batch at a time, while the next one gathers; it lives only while there is work.

    Of a crowd, several tasks send a part each: while one has its own written, another gets its own ready, and what was
    started runs.
    """

    def __init__(self, send: Callable[[list[_Waiting]], Any], most: int, *, width: int = 1) -> None:
        self._send = send
        self._most = most
        self._width = width
        self._waiting: list[_Waiting] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = 0

    def put(self, one: _Waiting) -> None:
        self._waiting.append(one)
        if not self._tasks or (len(self._tasks) < self._width and len(self._waiting) > _CROWD):
            self._tasks.add(asyncio.ensure_future(self._run()))

    async def close(self) -> None:
        if tasks := set(self._tasks):
            await asyncio.wait(tasks, timeout=_CLOSING_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        _cancel_all(self._waiting)

    async def _run(self) -> None:
        try:
            while self._waiting:
                share = -(-len(self._waiting) // (self._width - self._sending))
                batch = self._next(min(max(share, _CROWD), self._most))
                self._sending += 1
                try:
                    await self._send(batch)
                except asyncio.CancelledError:
                    _cancel_all(batch)
                    raise
                except Exception as error:  # whatever it is, nobody may wait for ever
                    _tell_all(batch, error)
                finally:
                    self._sending -= 1
        finally:
            self._tasks.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next(self, size: int) -> list[_Waiting]:
        """The first ones, about so many: what came in one call stays together, and in order, as far as a batch goes."""
        waiting = self._waiting
        while size < min(len(waiting), self._most) and waiting[size].call is waiting[size - 1].call:
            size += 1
        self._waiting = waiting[size:]
        return waiting[:size]


def _cancel_all(waiting: Sequence[_Waiting]) -> None:
    """Who waits for these is cancelled."""
    for one in waiting:
        one.call.done.cancel()


def _tell_all(waiting: Sequence[_Waiting], error: Exception) -> None:
    for one in waiting:
        one.tell(error)


def _refused(new: NewWorkflow, error: psycopg.Error) -> PerdureError:
    reason = str(error).partition("\n")[0]
    return SerializationError(f"the start of workflow {new.name!r}", "as PostgreSQL sees it", reason)


def _claim(new: NewWorkflow, worker_id: UUID, started_at: datetime) -> Claim:
    return Claim(
        workflow_id=new.id, name=new.name, worker_id=worker_id, epoch=1, input=new.input, started_at=started_at
    )

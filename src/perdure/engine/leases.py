"""The lease of a worker: the row that says it is alive, kept by a thread of its own.

A step that blocks the event loop must not cost the worker its lease, so the heartbeat has a thread with an event loop
and a connection of its own. (It doesn't run while C code holds the GIL; then the lease may run out, and the fence of
every write covers that.)

States: registering -> held -> lost -> registering -> ...; and, from any, ended.

- A beat is `UPDATE ... WHERE id = me AND expires_at > now()`. No row means that the lease ran out, by the database's
  clock: somebody may have taken over. Nothing revives it; the worker registers anew under a new id.
- Here, validity is counted on the monotonic clock from *before* the beat was sent: it ends no later than the database's
  view of it. A worker that couldn't renew by then ends its runs by itself, whether or not it can reach the database.
- A lost acknowledgement of a beat costs nothing: the next one renews. A lost acknowledgement of a registration leaves a
  row that nobody beats; the same id is sent again, and does nothing if it is there.
- After a lost lease the old row is marked dead by its own worker, as soon as it can: its runs have ended, so whatever
  it still held may be recovered at once, by anybody.

Everything that concerns the runs happens on the main loop: the thread only calls `on_beat`, `on_lost` and `on_held`
there, in this order.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

import psycopg

from perdure import telemetry
from perdure.config import Settings
from perdure.engine.watchdog import Watchdog
from perdure.errors import ConfigurationError, PerdureError
from perdure.model.ids import new_id
from perdure.store.arrays import BigInts, Floats, Ints, Texts, Uuids
from perdure.store.database import Connect, Database, Interrupted
from perdure.store.pauses import backoff
from perdure.store.statements import SHARD

_BEATS_A_LEASE = 4
_PATIENT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a worker says of itself."""

    app: str
    version: str
    names: tuple[str, ...]
    queues: tuple[str, ...] | None
    concurrency: int
    lease: timedelta
    only_version: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A step that has been running for longer than a beat."""

    workflow_id: UUID
    key: str
    epoch: int
    attempt: int
    seconds: float


class Lease:
    """Keeps a worker's row alive, from a thread."""

    def __init__(
        self,
        settings: Settings,
        registration: Registration,
        *,
        on_held: Callable[[UUID], None],
        on_lost: Callable[[UUID, str], None],
        on_beat: Callable[[int, int], None],
        known: Callable[[], Sequence[UUID] | None],
        long_bodies: Callable[[float], Sequence[Body]],
        connect: Connect | None = None,
        stands_still: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stands_still = stands_still
        self._seconds = registration.lease.total_seconds()
        self._beat_seconds = self._seconds / _BEATS_A_LEASE
        self._settings = replace(settings, statement_timeout=timedelta(seconds=max(0.5, self._seconds / 2)))
        self._registration = registration
        self._on_held = on_held
        self._on_lost = on_lost
        self._on_beat = on_beat
        self._known = known
        self._long_bodies = long_bodies
        self._connect = connect
        self._monotonic = monotonic
        self._main = asyncio.get_running_loop()
        self._watchdog = Watchdog(self._main)
        self._thread = threading.Thread(target=self._run_thread, name="perdure-lease", daemon=True)
        self._stop: asyncio.Event | None = None
        self._own: asyncio.AbstractEventLoop | None = None
        self._first: asyncio.Future[None] = self._main.create_future()
        self._ended: asyncio.Future[None] = self._main.create_future()
        self._shown = False
        self._clock: tuple[datetime, float] | None = None
        self._put_forward_to: datetime | None = None
        self._valid_until = 0.0
        self.worker_id: UUID | None = None

    @property
    def is_valid(self) -> bool:
        """Whether this worker may believe that nobody has taken over from it."""
        return self.worker_id is not None and self._monotonic() < self._valid_until

    def time(self) -> datetime:
        """The database's time, as of the last beat, and what has passed since."""
        assert self._clock is not None, "the lease has never been held"
        then, at = self._clock
        if self._stands_still:
            return then if self._put_forward_to is None else max(then, self._put_forward_to)
        return then + timedelta(seconds=self._monotonic() - at)

    def _read_clock(self, now: datetime, sent: float) -> None:
        """What the database's clock said at some time since then. An answer that came late makes it look slow.

        What is known already is kept as long as it may be right, so that no such answer sets the time back.
        """
        at = self._monotonic()
        if self._clock is not None and not self._stands_still:
            then, known_at = self._clock
            known = then + timedelta(seconds=at - known_at)
            if now <= known <= now + timedelta(seconds=at - sent):
                return
        self._clock = (now, at)

    def put_forward(self, to: datetime) -> None:
        """The database's clock stands there now. A beat that is under way may not know it yet, so this stands apart."""
        self._put_forward_to = to

    async def start(self) -> None:
        """Register; returns once the lease is held.

        Raises:
            ConfigurationError: The database refuses this worker.
        """
        self._thread.start()
        await self._first

    async def end(self) -> None:
        """Say goodbye: what is still held may be taken over at once."""
        if self._own is not None and self._stop is not None and self._thread.is_alive():
            self._own.call_soon_threadsafe(self._stop.set)
            await self._ended

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        failure: BaseException | None = None
        try:
            asyncio.run(self._keep())
        except BaseException as error:
            failure = error
        self._call(self._thread_ended, failure)

    def _thread_ended(self, failure: BaseException | None) -> None:
        if not self._first.done() and failure is not None:
            self._first.set_exception(failure)
        elif failure is not None:
            self._main.call_exception_handler({"message": "the lease's thread failed", "exception": failure})
            if self.worker_id is not None:
                self._lose(self.worker_id, f"its thread failed: {failure}")
        self._ended.set_result(None)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Have something done on the main loop; it may be gone."""
        try:
            self._main.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass

    async def _keep(self) -> None:
        self._own, self._stop = asyncio.get_running_loop(), asyncio.Event()
        database = Database(self._settings, connect=self._connect, pool_size=1)
        watching = asyncio.ensure_future(self._watchdog.run())
        held: UUID | None = None
        try:
            while not self._stop.is_set():
                held = id = await self._register(database, self._stop)
                if id is None:
                    break
                reason = await self._beat_while_held(database, id, self._stop)
                if reason is not None:
                    self._valid_until = 0.0
                    self._call(self._lose, id, reason)
                    telemetry.emit(telemetry.LeaseLost(worker_id=id, reason=reason))
                    held = None
                    await self._say(database, "end_worker", id, "dead", self._stop)
            if held is not None:
                await self._say(database, "end_worker", held, "stopped", None)
        finally:
            watching.cancel()
            await database.close()

    async def _register(self, database: Database, stop: asyncio.Event) -> UUID | None:
        """A new id in the table of workers; None: stopped meanwhile."""
        id, me = new_id(), self._registration
        host, pid = socket.gethostname(), os.getpid()
        queues = None if me.queues is None else json.dumps(me.queues)
        sent = self._monotonic()  # of the first try: whichever of them took effect, its lease began later
        for pause in backoff(0.1, 2.0):
            try:
                await database.attempt(
                    "register_worker", SHARD, id, me.app, me.version, host, pid, queues, json.dumps(me.names),
                    me.concurrency, self._seconds, me.only_version,
                )  # fmt: skip
                (clock,) = await database.attempt("clock")
            except PerdureError:
                if not self._first.done():
                    raise
            except (Interrupted, psycopg.Error):
                pass
            else:
                self._clock = (clock.now, self._monotonic())
                self._valid_until = sent + self._seconds
                self._call(self._hold, id)
                return id
            if await _happens(stop, pause):
                return None
        raise AssertionError("backoff never ends")

    def _hold(self, id: UUID) -> None:
        self.worker_id = id
        self._on_held(id)
        if not self._first.done():
            self._first.set_result(None)

    def _lose(self, id: UUID, reason: str) -> None:
        self.worker_id = None
        self._on_lost(id, reason)

    async def _beat_while_held(self, database: Database, id: UUID, stop: asyncio.Event) -> str | None:
        """Renew until stopped (None), or until the lease is lost (why)."""
        pause = self._beat_seconds
        while not await _happens(stop, pause):
            sent = self._monotonic()
            known = self._known()
            beat = asyncio.ensure_future(
                database.attempt("heartbeat", SHARD, id, None if known is None else Uuids(known))
            )
            # Not cancelled before it is given up: the driver would wait for the server to agree.
            await asyncio.wait({beat}, timeout=max(0.0, self._valid_until - sent))
            if not beat.done():
                beat.cancel()
                return "no beat reached the database in time"
            try:
                rows = beat.result()
            except (Interrupted, ConfigurationError, psycopg.Error) as error:
                if self._monotonic() + 0.05 >= self._valid_until:
                    return f"no beat reached the database: {error.args[0] if error.args else error}"
                pause = min(0.2, self._beat_seconds, max(0.0, self._valid_until - self._monotonic() - 0.05))
                continue
            if not rows:
                return "the database says that it ran out"
            if sent >= self._valid_until:
                return "this process was frozen for longer than the lease"
            self._valid_until = sent + self._seconds
            self._read_clock(rows[0].now, sent)
            self._call(self._on_beat, *rows[0].held)
            pause = self._beat_seconds
            await self._show_bodies(database, id)
        return None

    async def _show_bodies(self, database: Database, id: UUID) -> None:
        """Keep the table of running steps; nothing is written as long as there are none."""
        bodies = self._long_bodies(self._beat_seconds)
        if not bodies and not self._shown:
            return
        self._shown = bool(bodies)
        try:
            await database.attempt(
                "running_steps", SHARD, id, Uuids(body.workflow_id for body in bodies),
                Texts(body.key for body in bodies), BigInts(body.epoch for body in bodies),
                Ints(body.attempt for body in bodies), Floats(body.seconds for body in bodies),
            )  # fmt: skip
        except (Interrupted, ConfigurationError, psycopg.Error):
            pass  # the next beat shows them

    async def _say(self, database: Database, statement: str, id: UUID, status: str, stop: asyncio.Event | None) -> None:
        """Tell the database how this id ended, for a few seconds; else its lease runs out."""
        deadline = self._monotonic() + _PATIENT_SECONDS
        for pause in backoff():
            try:
                await database.attempt(statement, SHARD, id, status)
                return
            except (Interrupted, PerdureError, psycopg.Error):
                if stop is None and self._monotonic() > deadline:
                    return
            if await _happens(stop or asyncio.Event(), pause):
                return


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, for so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True

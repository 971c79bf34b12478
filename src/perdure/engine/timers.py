"""Timers: what waits until a certain time becomes pending when the database's clock says so, never earlier.

Sleeping workflows, pauses between attempts, delayed starts and limits of time are rows of `waits`; deadlines are rows
of their own, because a workflow has one whether it waits or not. A deadline that has passed is a request to end
(`cancel`), like an operator's. It is forgotten only when that is done: should the process die in between, the next
look does it again, and finds the request there.

The same look sees notes for parents that somebody has left: so an idle worker asks once a second, for both.

Where dead rows can't be removed, looks leave out what was due a minute before the last one, which found nothing left,
and notes that are five seconds older; what was committed later than that is found by a look from the front, now and
then (bloat.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from uuid import UUID

from perdure import failures, telemetry
from perdure.engine.bloat import Bloat, Pace
from perdure.engine.loop import Loop, Turns
from perdure.errors import DeadlineExceeded
from perdure.model.ids import first_id
from perdure.model.keys import DEADLINE
from perdure.store.arrays import Texts, Uuids
from perdure.store.database import Database
from perdure.store.statements import SHARD

_BATCH = 500
_LOOK_SECONDS = 1.0
_LATE = timedelta(minutes=1)
_LATE_NOTES = timedelta(seconds=5)


class Timers(Loop):
    """Wakes what is due. Every worker does; who deletes the `waits` row inserts the entry, so it happens once."""

    name = "timers"

    def __init__(
        self,
        database: Database,
        names: tuple[str, ...],
        *,
        bloat: Bloat,
        turns: Turns,
        on_woken: Callable[[set[str]], None],
        on_asked: Callable[[Iterable[UUID]], None],
        on_notes: Callable[[], None],
    ) -> None:
        super().__init__(_LOOK_SECONDS, turns=turns)
        self._database = database
        self._names = Texts(names)
        self._on_woken = on_woken
        self._on_asked = on_asked
        self._on_notes = on_notes
        self._front = Pace(bloat)
        self._looked_at: datetime | None = None
        self._ticks = 0

    async def tick(self) -> float | None:
        async with self.turns.turn():
            return await self._look()

    async def _look(self) -> float | None:
        with self._front.look_from(self._looked_at) as looked_at:
            since = None if looked_at is None else looked_at - _LATE
            note = first_id(None if looked_at is None else looked_at - _LATE_NOTES)
            (next_due,) = await self._database.attempt("next_due", SHARD, since, note)
        woken: set[str] = set()
        if next_due.seconds is not None and next_due.seconds <= 0:
            woken |= await self._wake(since)
        if self._ticks % 30 == 0:
            # Parked for want of a worker that knows them: at our registration, and for whoever parked them since.
            while rows := await self._database.attempt("unpark", SHARD, self._names, _BATCH):
                woken.update(row.queue for row in rows)
        self._ticks += 1
        if woken:
            telemetry.emit(telemetry.WorkflowsWoken(queues=tuple(sorted(woken))))
            self._on_woken(woken)
            (next_due,) = await self._database.attempt("next_due", SHARD, since, note)
        self._looked_at = next_due.now
        if next_due.notes:
            self._on_notes()
        return None if next_due.seconds is None else max(0.001, min(self.interval, next_due.seconds))

    async def _wake(self, since: datetime | None) -> set[str]:
        """Wake all that is due; returns the queues in which something is pending now."""
        woken: set[str] = set()
        while rows := await self._database.attempt("wake_due", SHARD, _BATCH, since):
            woken.update(row.queue for row in rows)
        while due := await self._database.attempt("due_deadlines", SHARD, _BATCH, since):
            woken |= await self._end([row.workflow_id for row in due])
        return woken

    async def _end(self, ids: list[UUID]) -> set[str]:
        """The time of these is over; returns the queues in which they are pending now."""
        said = json.dumps({"by": DEADLINE, "reason": "its deadline has passed"})
        result = failures.record(DeadlineExceeded("which passed before it could begin"))
        rows = await self._database.attempt("cancel", SHARD, Uuids(ids), DEADLINE, said, None, "error", result)
        reached = {row.workflow_id for row in rows}
        left = [id for id in ids if id not in reached]
        if left:  # ended, as most are, or spoilt by hand; or it moves in this moment, and the next look finds it
            states = await self._database.attempt("states", SHARD, Uuids(left))
            moving = {row.id for row in states if row.status in ("pending", "running", "waiting")}
        else:
            moving = set[UUID]()
        await self._database.attempt("forget_deadlines", SHARD, Uuids(id for id in ids if id not in moving))
        self._on_asked([row.workflow_id for row in rows if not row.ended])
        return {row.queue for row in rows}

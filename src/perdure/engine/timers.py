"""Timers: what waits until a certain time becomes pending when the database's clock says so, never earlier."""

from __future__ import annotations

from collections.abc import Callable

from perdure.engine.loop import Loop, Turns
from perdure.store.arrays import Texts
from perdure.store.database import Database
from perdure.store.statements import SHARD

_BATCH = 500
_LOOK_SECONDS = 1.0


class Timers(Loop):
    """Wakes what is due. Every worker does; who deletes the `waits` row inserts the entry, so it happens once."""

    name = "timers"

    def __init__(
        self, database: Database, names: tuple[str, ...], *, turns: Turns, on_woken: Callable[[set[str]], None]
    ) -> None:
        super().__init__(_LOOK_SECONDS, turns=turns)
        self._database = database
        self._names = Texts(names)
        self._on_woken = on_woken
        self._ticks = 0

    async def tick(self) -> float | None:
        async with self.turns.turn():
            return await self._look()

    async def _look(self) -> float | None:
        woken: set[str] = set()
        while rows := await self._database.attempt("wake_due", SHARD, _BATCH):
            woken.update(row.queue for row in rows)
        if self._ticks % 30 == 0:
            # Parked for want of a worker that knows them: at our registration, and for whoever parked them since.
            while rows := await self._database.attempt("unpark", SHARD, self._names, _BATCH):
                woken.update(row.queue for row in rows)
        self._ticks += 1
        if woken:
            self._on_woken(woken)
        (next_due,) = await self._database.attempt("next_due", SHARD)
        return None if next_due.seconds is None else max(0.001, min(_LOOK_SECONDS, next_due.seconds))

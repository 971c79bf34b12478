"""Parents: whoever has a child that ended is told, by a note in the outbox that the end left behind.

    a child ends, and its note is committed with its result -> somebody finds the note -> the parent's wakes are counted
    up, or it becomes pending

Every worker looks, soon after children ended here, and where its timers have seen what others left (a process that
died between a flush and this). Who finds a note locks it, so it is dealt with once. A parent that moves between its
entry and its `waits` row in this moment is found in neither: its note stays for the next look.

A parent that runs here has heard already, from the child: its notes wait for others a little longer.

Where dead rows can't be removed, looks leave out notes that are older than a second at the time of the last look that
left nothing; those that are committed later than that wait for a look from the front, now and then (bloat.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from perdure.engine.bloat import Bloat, Pace
from perdure.engine.loop import Loop, Turns
from perdure.model.ids import first_id
from perdure.store.database import Database
from perdure.store.statements import SHARD

_LOOK_SECONDS = 30.0
_PAUSE_SECONDS = 0.005
_LONG_PAUSE_SECONDS = 0.025
_MOST = 500
_LATE = timedelta(seconds=1)


class Parents(Loop):
    """Tells parents that a child has ended."""

    name = "parents"

    def __init__(
        self,
        database: Database,
        *,
        bloat: Bloat,
        turns: Turns,
        on_woken: Callable[[set[str]], None],
        on_asked: Callable[[Iterable[UUID]], None],
    ) -> None:
        super().__init__(_LOOK_SECONDS, turns=turns)
        self._database = database
        self._on_woken = on_woken
        self._on_asked = on_asked
        self._front = Pace(bloat)
        self._since: datetime | None = None
        self._has_notes = False
        self._hurried = asyncio.Event()

    def child_ended(self, *, is_told: bool) -> None:
        """There is a note; its parent may have been told."""
        self._has_notes = True
        if not is_told:
            self._hurried.set()
        self.wake()

    def look(self) -> None:
        """Somebody has seen a note."""
        self.child_ended(is_told=True)

    @property
    def is_at_rest(self) -> bool:
        """Whether there is no note that it knows of."""
        return not self._has_notes

    async def tick(self) -> float | None:
        if self._has_notes:  # more will end meanwhile
            with suppress(TimeoutError):
                async with asyncio.timeout(_LONG_PAUSE_SECONDS):
                    await self._hurried.wait()
                    await asyncio.sleep(_PAUSE_SECONDS)
        async with self.turns.turn():
            self._has_notes = False
            self._hurried.clear()
            try:
                with self._front.look_from(self._since) as since:
                    (found,) = await self._database.attempt("wake_parents", SHARD, _MOST, first_id(since))
            except BaseException:
                self._has_notes = True
                raise
        if found.queues:
            self._on_woken(set(found.queues))
        if found.running:
            self._on_asked(found.running)
        if found.left or found.found == _MOST:
            self._has_notes = True
            return _PAUSE_SECONDS
        self._since = found.now - _LATE
        return None

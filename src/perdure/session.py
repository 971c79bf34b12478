"""What a client has for one event loop: the pool, the starter, the results that are waited for, and the hints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol
from uuid import UUID

from perdure.config import Settings
from perdure.results import Results
from perdure.starter import Local, Starter
from perdure.store.database import Connect, Database
from perdure.store.listener import Listener, Notifier

_RESIDENT_CONNECTIONS = 4
"""What a worker needs beside its clients: writer, claimer, and what looks now and then."""
_SAY_SECONDS = 3.0
_WANTED_SECONDS = 10.0


class Resident(Local, Protocol):
    """A worker that lives on this loop."""

    def hint(self, queue: str) -> None:
        """Something is pending there."""

    def results_wanted(self) -> None:
        """Somebody, somewhere, waits for results."""

    def asked(self, id: UUID) -> None:
        """Somebody has something for that workflow."""

    def timer_set(self) -> None:
        """Something will be due, perhaps earlier than anything else."""


class Session:
    """Belongs to one event loop; made at the first verb, closed with the client."""

    def __init__(self, settings: Settings, *, connect: Connect | None = None) -> None:
        self.settings = settings
        self.connect = connect
        self.database = Database(settings, connect=connect)
        self.notifier = Notifier(self.database)
        self.listener = Listener(self.database, self._on_hint)
        self.starter = Starter(self.database, settings, on_started=self._on_started, on_timer=self.timer_set)
        self.results = Results(self.database, say_waiting=self._say_waiting, hears=lambda: self.listener.hears)
        self._listening: asyncio.Task[None] | None = None
        self._events: dict[UUID, list[asyncio.Future[None]]] = {}
        self._said_at = self._wanted_until = float("-inf")
        self._resident: Resident | None = None
        self._widened = False

    def listen(self) -> None:
        """Hear hints from now on: whoever waits for something calls this."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self.listener.run())

    def move_in(self, resident: Resident) -> None:
        """A worker lives here from now on: starts may be claimed at birth, hints go to it."""
        if not self._widened:
            self.database.widen(_RESIDENT_CONNECTIONS)
            self._widened = True
        self._resident = resident
        self.starter.local = resident
        self.listen()

    def move_out(self) -> None:
        """The worker leaves."""
        self._resident = None
        self.starter.local = None

    @property
    def has_resident(self) -> bool:
        """Whether a worker lives on this loop."""
        return self._resident is not None

    async def close(self) -> None:
        """Close everything; what callers still wait for is cancelled."""
        await self.starter.close()
        await self.results.close()
        await self.notifier.close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self.database.close()

    def tell(self, *, queues: Iterable[str] = (), asked: Iterable[UUID] = (), ended: Iterable[UUID] = ()) -> None:
        """Say, here and elsewhere, what has changed: hints, which may get lost."""
        self._on_started(set(queues))
        for id in asked:
            if self._resident is not None:
                self._resident.asked(id)
            self.notifier.notify(f"workflow {id}")
        for id in ended:
            self.results.hint(id)
            self.notifier.notify(f"result {id}")

    def announced(self, id: UUID) -> None:
        """That workflow has set an event: say so, here, and elsewhere if somebody waits for anything there."""
        self._event_hinted(id)
        if asyncio.get_running_loop().time() < self._wanted_until:
            self.notifier.notify(f"event {id}")

    async def event_hint(self, id: UUID, seconds: float) -> None:
        """Wait until somebody says that a workflow has set an event, but no longer than that."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._said_at > _SAY_SECONDS:
            self._said_at = loop.time()
            self._say_waiting()
        future: asyncio.Future[None] = loop.create_future()
        futures = self._events.setdefault(id, [])
        futures.append(future)
        try:
            await asyncio.wait({future}, timeout=seconds)
        finally:
            futures.remove(future)
            if not futures and self._events.get(id) is futures:
                del self._events[id]

    def _event_hinted(self, id: UUID) -> None:
        for future in self._events.get(id, ()):
            if not future.done():
                future.set_result(None)

    def timer_set(self) -> None:
        """Something will be due: the timers of a worker that lives here look again."""
        if self._resident is not None:
            self._resident.timer_set()

    def _on_started(self, queues: set[str]) -> None:
        for queue in queues:
            if self._resident is not None:
                self._resident.hint(queue)
            self.notifier.notify(f"queue {queue}")

    def _say_waiting(self) -> None:
        self.listen()
        self.notifier.notify("waiting")
        if self._resident is not None:
            self._resident.results_wanted()

    def _on_hint(self, hint: str) -> None:
        if self.notifier.is_own(hint):
            return
        kind, _, rest = hint.partition(" ")
        kind = kind.partition("@")[0]
        if kind == "queue" and self._resident is not None:
            self._resident.hint(rest)
        elif kind == "waiting":
            self._wanted_until = asyncio.get_running_loop().time() + _WANTED_SECONDS
            if self._resident is not None:
                self._resident.results_wanted()
        elif kind in ("result", "workflow", "event"):
            try:
                id = UUID(rest)
            except ValueError:
                return  # anybody may NOTIFY
            if kind == "result":
                self.results.hint(id)
            elif kind == "event":
                self._event_hinted(id)
            elif self._resident is not None:
                self._resident.asked(id)

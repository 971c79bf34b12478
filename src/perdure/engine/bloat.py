"""Where dead rows pile up: what looks at the front of an index does so less often.

The oldest that is pending, the next timer, the workers that hold something: whatever is looked for in order stands at
the front of an index, and what stood there before it is dead. PostgreSQL removes that, unless somebody holds a
transaction open: then each such look walks over all that has died since, and the database has no time left for anything
else.

So a worker asks now and then how many rows are dead. While they are many, looks from the front that take long, three in
a row, are followed by a pause that is twenty times as long: they take a twentieth of the time at most, whatever piles
up. One look that takes long says something about the machine, and changes nothing.

In the pauses, claims go on from where they have come to (`Front`). A row is seen when it is committed, and its place is
the time at which its statement began; so they begin a second before now at the latest, and as often as that isn't dear
a quarter of a minute before. Only what stands before that waits for the next look from the front: what comes back to an
earlier place (taken over from the dead, woken, let go), what a long transaction commits, and priorities that this
worker hasn't met.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from perdure.engine.loop import Loop, Turns
from perdure.store.arrays import Texts
from perdure.store.database import Database
from perdure.store.statements import quoted

TABLES = ("queue_entries", "waits", "outbox")
"""Those that rows only pass through, and of which the front is looked at."""
_ASK_SECONDS = 10.0
_MANY = 20_000
_IN_A_ROW = 3
_DEAR_SECONDS = 0.02
_REST = 20
_LONGEST_SECONDS = 30.0
_LATE = timedelta(seconds=1)
_LATER = timedelta(seconds=15)
_MOST_PRIORITIES = 32
_FIRST = UUID(int=0)

T = TypeVar("T")

Place = tuple[datetime, UUID]
Places = tuple[list[int], list[datetime], list[UUID]]
"""Priorities, highest first, and for each of them the time and the id from which to go on."""


class Bloat(Loop):
    """How many rows are dead in the worst table."""

    name = "bloat"

    def __init__(self, database: Database, *, turns: Turns) -> None:
        super().__init__(_ASK_SECONDS, turns=turns)
        self._database = database
        self._tables = Texts(f"{quoted(database.settings.schema)}.{table}" for table in TABLES)
        self._answers: deque[float] = deque(maxlen=_IN_A_ROW)
        self.dead = 0

    async def tick(self) -> float | None:
        async with self.turns.turn():
            began = now()
            (row,) = await self._database.attempt("dead_rows", self._tables)
            self._answers.append(now() - began)
        self.dead = row.dead
        return None

    @property
    def is_heavy(self) -> bool:
        """Whether they are many."""
        return self.dead >= _MANY

    @property
    def answer_seconds(self) -> float:
        """What any answer takes, of a statement that walks over nothing."""
        return min(self._answers, default=0.0)


class Pace:
    """When one kind of look may be taken again."""

    __slots__ = ("_bloat", "_due", "_took")

    def __init__(self, bloat: Bloat) -> None:
        self._bloat = bloat
        self._due = 0.0
        self._took: deque[float] = deque(maxlen=_IN_A_ROW)

    @property
    def is_due(self) -> bool:
        """Whether it may be taken now."""
        return now() >= self._due

    @contextmanager
    def look(self) -> Generator[None]:
        """It is taken, in the block."""
        began = now()
        try:
            yield
        finally:
            ended = now()
            self._took.append(ended - began)
            if self._bloat.is_heavy and len(self._took) == _IN_A_ROW:
                self._due = ended + pause_after(min(self._took) - self._bloat.answer_seconds)

    @contextmanager
    def look_from(self, place: T | None) -> Generator[T | None]:
        """A look, in the block, from that place; None: from the front, since it may be taken, or no place is known."""
        if place is None or self.is_due:
            with self.look():
                yield None
        else:
            yield place


class Front:
    """The front of a queue, and how far claims have come from there in each priority."""

    __slots__ = ("_from_before", "_places", "_whole")

    def __init__(self, bloat: Bloat) -> None:
        self._whole = Pace(bloat)
        self._from_before = Pace(bloat)
        self._places: dict[int, Place] = {}

    @contextmanager
    def look(self, time: datetime) -> Generator[Places | None]:
        """Claim in the block, from these places; None: from the front.

        Args:
            time: The database's.
        """
        if self._whole.is_due:
            with self._whole.look():
                yield None
        elif self._from_before.is_due:
            with self._from_before.look():
                yield self._no_later_than(time - _LATER)
        else:
            yield self._no_later_than(time - _LATE)

    def came_to(self, rows: Sequence[Any], time: datetime, *, is_all: bool) -> None:
        """These were claimed.

        Args:
            rows: As the claim returned them, in their order in the queue.
            time: The database's, when it was sent.
            is_all: Whether there is nothing behind them.
        """
        for priority in {row.priority: None for row in rows}:
            self._places[priority] = self._places.pop(priority, (time, _FIRST))  # met last
        while len(self._places) > _MOST_PRIORITIES:
            del self._places[next(iter(self._places))]
        last = None if is_all else rows[-1]
        for priority in [*self._places, 0]:
            if last is None or priority > last.priority:
                self._places[priority] = (time, _FIRST)  # nothing is left there
        if last is not None:
            self._places[last.priority] = (last.enqueued_at.astimezone(UTC), last.workflow_id)

    def _no_later_than(self, time: datetime) -> Places:
        priorities = sorted(self._places, reverse=True)
        places = [min(self._places[priority], (time, _FIRST)) for priority in priorities]
        return priorities, [at for at, _ in places], [id for _, id in places]


def pause_after(seconds: float) -> float:
    """How long to leave it after looks that took so long."""
    return min(_REST * seconds, _LONGEST_SECONDS) if seconds >= _DEAR_SECONDS else 0.0


def now() -> float:
    return asyncio.get_running_loop().time()

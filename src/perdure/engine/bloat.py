"""Where dead rows pile up: what looks at the front of an index does so less often.

The oldest that is pending, the workers that hold something: whatever is looked for in order stands at the front of an
index, and what stood there before it is dead. PostgreSQL removes that, unless somebody holds a transaction open: then
each such look walks over all that has died since, and the database has no time left for anything else.

So the heartbeat brings along how many rows of the queue are dead. While they are many, a look that took long is
followed by a pause that is twenty times as long: it takes a twentieth of the time at most, whatever piles up. Where few
are dead, a look that took long says something about the machine, and nothing changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

_MANY = 20_000
_DEAR_SECONDS = 0.02
_REST = 20
_LONGEST_SECONDS = 30.0

Place = tuple[datetime, UUID]


class Bloat:
    """How many rows of the queue are dead, as of the last beat."""

    __slots__ = ("dead",)

    def __init__(self) -> None:
        self.dead = 0

    @property
    def is_heavy(self) -> bool:
        return self.dead >= _MANY


class Pace:
    """When one kind of look may be taken again."""

    __slots__ = ("_bloat", "_due")

    def __init__(self, bloat: Bloat) -> None:
        self._bloat = bloat
        self._due = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it may be taken now."""
        return _now() >= self._due

    @contextmanager
    def look(self) -> Generator[None]:
        """It is taken, in the block."""
        began = _now()
        try:
            yield
        finally:
            ended = _now()
            if self._bloat.is_heavy and ended - began >= _DEAR_SECONDS:
                self._due = ended + min(_REST * (ended - began), _LONGEST_SECONDS)


class Front(Pace):
    """The front of a queue, and how far claims have come from there: in each priority, to the last one that was taken.

    Before that stands what has come back (taken over, woken, let go) or came late (a long transaction), and priorities
    that haven't been seen yet: a look from the front finds them.
    """

    __slots__ = ("_places",)

    def __init__(self, bloat: Bloat) -> None:
        super().__init__(bloat)
        self._places: dict[int, Place] = {}

    @property
    def is_known(self) -> bool:
        """Whether claims have come anywhere yet."""
        return bool(self._places)

    @property
    def places(self) -> tuple[list[int], list[datetime], list[UUID]]:
        """How far they have come: priorities, highest first, with the times and ids of the last ones."""
        priorities = sorted(self._places, reverse=True)
        return (
            priorities,
            [self._places[each][0] for each in priorities],
            [self._places[each][1] for each in priorities],
        )

    def came_to(self, rows: Iterable[Any], *, goes_on: bool) -> None:
        """These were claimed; `goes_on`: from the front, and there are more behind them."""
        last: dict[int, Place] = {}
        for row in rows:
            place = (row.enqueued_at, row.workflow_id)
            last[row.priority] = max(last.get(row.priority, place), place)
        for priority, place in last.items():
            # What has come back is old: claims go on where they were, unless there is so much of it that they begin
            # anew there (a clock that was set back).
            self._places[priority] = place if goes_on else max(self._places.get(priority, place), place)


def _now() -> float:
    return asyncio.get_running_loop().time()

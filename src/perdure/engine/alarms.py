"""What a worker waits for in memory: short sleeps, pauses between attempts, limits of time.

Counted on the monotonic clock, so that nobody's setting of a clock makes one early. In a test the database's clock
stands still until it is put forward (`shift`), and so does this one; it counts whole microseconds, as that one does, so
that many small shifts come to the same instant as a large one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_DIGITS = 6


class Alarm:
    """Rings once, unless it is cancelled before."""

    __slots__ = ("_alarms", "_ring", "due", "handle")

    def __init__(self, alarms: Alarms, due: float, ring: Callable[[], None]) -> None:
        self._alarms = alarms
        self._ring = ring
        self.handle: asyncio.TimerHandle | None = None
        self.due = due
        """When it rings, by the clock of the alarms."""

    def cancel(self) -> None:
        """It won't ring any more."""
        self._alarms.forget(self)
        if self.handle is not None:
            self.handle.cancel()

    def rings(self) -> None:
        """It is due."""
        self._alarms.forget(self)
        self._ring()


class Alarms:
    """All that a worker's runs wait for in memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, stands_still: bool = False) -> None:
        self._loop = loop
        self._stopped_at = round(loop.time(), _DIGITS) if stands_still else None
        self._set: dict[Alarm, None] = {}  # in the order in which they were set, which decides between equals

    def time(self) -> float:
        """What the clock says, in seconds; only differences mean something."""
        return self._loop.time() if self._stopped_at is None else self._stopped_at

    @property
    def next_due(self) -> float | None:
        """In how many seconds the next one is due; None: there is none."""
        return min((alarm.due for alarm in self._set), default=self.time()) - self.time() if self._set else None

    def set(self, seconds: float, ring: Callable[[], None]) -> Alarm:
        """Call `ring` in so many seconds; what was due earlier rings earlier, also in the past."""
        due = self.time() + seconds
        alarm = Alarm(self, due if self._stopped_at is None else round(due, _DIGITS), ring)
        self._set[alarm] = None
        self._arm(alarm)
        return alarm

    def forget(self, alarm: Alarm) -> None:
        """It has rung, or was cancelled."""
        self._set.pop(alarm, None)

    def shift(self, seconds: float) -> None:
        """The clock is put forward by so much. Only one that stands still can be."""
        assert self._stopped_at is not None
        self._stopped_at = round(self._stopped_at + seconds, _DIGITS)
        for alarm in sorted(self._set, key=lambda alarm: alarm.due):
            self._arm(alarm)

    def _arm(self, alarm: Alarm) -> None:
        if self._stopped_at is None:
            alarm.handle = self._loop.call_at(alarm.due, alarm.rings)
        elif alarm.due <= self._stopped_at and alarm.handle is None:
            # In the order in which they were due: as the loop does it.
            alarm.handle = self._loop.call_at(self._loop.time() - self._stopped_at + alarm.due, alarm.rings)

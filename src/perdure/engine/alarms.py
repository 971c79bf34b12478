"""What a worker waits for in memory: short sleeps, pauses between attempts, limits of time.

Counted on the monotonic clock, so that nobody's setting of a clock makes one early. They follow the database's clock
all the same where that jumps on purpose (`shift`): a test puts it forward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once, unless it is cancelled before."""

    __slots__ = ("_alarms", "_handle", "due", "ring")

    def __init__(self, alarms: Alarms, due: float, ring: Callable[[], None]) -> None:
        self._alarms = alarms
        self._handle: asyncio.TimerHandle | None = None
        self.due = due
        """When it rings, by the loop's clock."""
        self.ring = ring

    def cancel(self) -> None:
        """It won't ring any more."""
        self._alarms.forget(self)
        if self._handle is not None:
            self._handle.cancel()

    def arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = loop.call_at(self.due, self._rings)

    def _rings(self) -> None:
        self._alarms.forget(self)
        self.ring()


class Alarms:
    """All that a worker's runs wait for in memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._set: set[Alarm] = set()

    def set(self, seconds: float, ring: Callable[[], None]) -> Alarm:
        """Call `ring` in so many seconds; what was due earlier rings earlier, also in the past."""
        alarm = Alarm(self, self._loop.time() + seconds, ring)
        self._set.add(alarm)
        alarm.arm(self._loop)
        return alarm

    def forget(self, alarm: Alarm) -> None:
        """It has rung, or was cancelled."""
        self._set.discard(alarm)

    def shift(self, seconds: float) -> None:
        """The database's clock was put forward by so much."""
        for alarm in list(self._set):
            alarm.due -= seconds
            alarm.arm(self._loop)

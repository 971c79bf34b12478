"""Durable waits: `sleep`, `sleep_until`, `perdure.timeout`; and how the code that waits is woken.

    the wait begins -> its due time is recorded -> it is due -> its turn -> its end is recorded, and the code goes on

When it is due is recorded as soon as the wait begins (write-behind, like any outcome), so a crash neither forgets the
wait nor begins it anew. That it is over is an outcome of its own, with a place in the order of delivery: a race between
a timer and a step takes the same branch on every replay.

A short wait stays in memory. When all tasks of a run wait, and for longer than a moment, the run suspends (see run.py):
then nothing is left of it but a row, and the next run finds the recorded due time, and waits for what is left of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from perdure.engine.alarms import Alarm, Alarms
from perdure.engine.delivery import Delivery, give
from perdure.engine.memory import Memory
from perdure.errors import RunEnded
from perdure.model.keys import timer_key
from perdure.model.records import Checkpoint, Recorded


class Host(Protocol):
    """What a wait needs of the process that it is in."""

    loop: asyncio.AbstractEventLoop
    alarms: Alarms


class Waiter(Protocol):
    """What a wait needs of its run."""

    over: bool
    delivery: Delivery
    history: dict[str, Recorded]
    memory: Memory
    waits: Waits

    @property
    def host(self) -> Host: ...
    def record(self, checkpoint: Checkpoint, *, is_patient: bool = False) -> None: ...
    def mismatch(self, recorded: Recorded, asked: str) -> RunEnded: ...


class _Wait:
    """One wait of a run: for what, and until when."""

    __slots__ = ("alarm", "kind", "ring")

    def __init__(self, kind: str, ring: Callable[[], None]) -> None:
        self.kind = kind
        self.ring = ring
        self.alarm: Alarm | None = None


class Waits:
    """What a run waits for: the earliest of it says when the run must be awake again."""

    __slots__ = ("_alarms", "_kinds", "_rung", "_timed", "_waits", "frozen")

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self._waits: dict[str, _Wait] = {}
        self._timed: dict[_Wait, None] = {}
        self._kinds: dict[str, int] = {}
        self._rung: list[_Wait] = []
        self.frozen = False
        """The run is about to leave memory: nothing wakes its code meanwhile."""

    def add(self, key: str, kind: str, seconds: float | None, ring: Callable[[], None]) -> None:
        """Wait under that key for so many seconds (None: until it is released), then call `ring`."""
        wait = self._waits[key] = _Wait(kind, ring)
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if seconds is not None:
            self._timed[wait] = None
            wait.alarm = self._alarms.set(seconds, partial(self._rings, wait))

    def remove(self, key: str) -> None:
        """That wait is over, or given up."""
        wait = self._waits.pop(key, None)
        if wait is None:
            return
        self._kinds[wait.kind] -= 1
        if wait.alarm is not None:
            wait.alarm.cancel()
            del self._timed[wait]

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to wait for, and none of it is due."""
        now = self._alarms.time()
        return bool(self._waits) and all(due > now for due, _ in self._due())

    def of(self, kind: str) -> list[str]:
        """The keys of the waits of that kind."""
        return [key for key, wait in self._waits.items() if wait.kind == kind]

    def has(self, kind: str) -> bool:
        """Whether there is a wait of that kind."""
        return self._kinds.get(kind, 0) > 0

    def release(self, key: str) -> None:
        """What that wait was for has come."""
        self._rings(self._waits[key])

    def earliest(self) -> tuple[str, float | None]:
        """What the run waits for first, and until when by the clock of the alarms; None: without a limit."""
        if self._timed:
            due, kind = min(self._due())
            return kind, due
        return next((wait.kind for wait in self._waits.values()), "timer"), None

    def _due(self) -> Iterator[tuple[float, str]]:
        return ((wait.alarm.due, wait.kind) for wait in self._timed if wait.alarm is not None)

    def thaw(self) -> None:
        """The run stays: what rang meanwhile rings now."""
        self.frozen = False
        rung, self._rung = self._rung, []
        for wait in rung:
            wait.ring()

    def clear(self) -> None:
        """The run is over."""
        for key in list(self._waits):
            self.remove(key)
        self._rung.clear()

    def _rings(self, wait: _Wait) -> None:
        if self.frozen:
            self._rung.append(wait)
        else:
            wait.ring()


async def wait(run: Waiter, key: str, kind: str, seconds: float | None) -> float:
    """Wait in memory, in a way in which the run may suspend; returns when it was due, by the clock of the alarms."""
    loop = run.host.loop
    future: asyncio.Future[None] = loop.create_future()
    task = asyncio.current_task(loop)
    due = run.host.alarms.time() + (seconds or 0.0)

    def ring() -> None:
        if not future.done():  # else its task may be in another wait by now
            run.delivery.rouse(task)
            loop.call_soon(give, future, None)

    run.waits.add(key, kind, seconds, ring)
    try:
        with run.delivery.dormant():
            await future
    finally:
        run.waits.remove(key)
    if run.over:
        raise RunEnded
    return due


async def sleep(run: Waiter, key: str, name: str, delay: Callable[[], timedelta]) -> None:
    """A durable wait of the workflow's code."""
    recorded = run.history.pop(key, None)
    if recorded is not None:
        if recorded.kind != "sleep":
            raise run.mismatch(recorded, f"{name}()")
        await run.delivery.replay(recorded.position)
        if run.over:
            raise RunEnded
        return
    if run.history or run.delivery.has_recorded:
        await run.delivery.live()
    due = await wait(run, key, "timer", begun(run, key, delay))
    position = await run.delivery.turn(due)
    run.record(Checkpoint(key, "sleep", position, "success", None))


def begun(run: Waiter, key: str, delay: Callable[[], timedelta]) -> float:
    """What is left of a wait that began before; a new one is recorded."""
    left = run.memory.timers.pop(key, None)
    if left is not None:
        return left
    seconds = max(0.0, delay().total_seconds())
    run.record(Checkpoint(timer_key(key), "timer", run.delivery.position, "success", None, delay=seconds))
    return seconds


class Limit:
    """`perdure.timeout`:

    what its block does must end in time, or it is cancelled, and the block raises TimeoutError.
    """

    def __init__(self, run: Waiter, key: str, delay: timedelta | None) -> None:
        self._run = run
        self._key = key
        self._delay = delay
        self._task: asyncio.Task[Any] | None = None
        self._turn: asyncio.Future[int] | None = None
        self._cancelling = 0
        self._expired = False
        self._inside = False

    @property
    def expired(self) -> bool:
        """Whether its time ran out."""
        return self._expired

    async def __aenter__(self) -> Self:
        run = self._run
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._inside = True
        if self._delay is None:
            return self
        recorded = run.history.pop(self._key, None)
        if recorded is not None:
            if recorded.kind != "sleep":
                raise run.mismatch(recorded, "timeout()")
            self._take_turn(run.delivery.recorded(recorded.position), is_new=False)
            return self
        # No wait for the history to be served: the code went on at once when this was recorded, before other tasks did.
        delay = self._delay
        left = begun(run, self._key, lambda: delay)
        due = run.host.alarms.time() + left
        run.waits.add(self._key, "timer", left, lambda: self._take_turn(run.delivery.arrived(due), is_new=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._run.waits.remove(self._key)
        if self._turn is not None and not self._turn.done():
            self._turn.cancel()
        if not self._expired or self._task is None:
            return
        # Others may have cancelled this task as well: then their cancellation goes on.
        mine_alone = self._task.uncancel() <= self._cancelling
        if mine_alone and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def _take_turn(self, turn: asyncio.Future[int], *, is_new: bool) -> None:
        self._turn = turn
        turn.add_done_callback(partial(self._expire, is_new=is_new))

    def _expire(self, turn: asyncio.Future[int], *, is_new: bool) -> None:
        run = self._run
        if turn.cancelled() or run.over or not self._inside:
            return
        assert self._task is not None
        if is_new:
            run.record(Checkpoint(self._key, "sleep", turn.result(), "success", None))
        self._expired = True
        self._task.cancel()

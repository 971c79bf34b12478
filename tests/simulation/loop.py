"""An event loop without a world: virtual time, several processes on it, and chance instead of a scheduler.

Each callback belongs to a process: the one whose context it runs in. Within a process callbacks run in the order in
which they became ready, as on any event loop; whose turn it is among the processes is drawn. When nobody can go on, the
time jumps to the next timer. So a simulation takes no longer than its computing, and the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(Exception):
    """Nobody can go on, and no timer is set."""


class Process:
    """What can be frozen and killed. Its threads are processes of their own that share its fate."""

    def __init__(self, name: str, parent: Process | None = None) -> None:
        self.name = name
        self.parent = parent
        self.ready: deque[asyncio.Handle] = deque()
        self.is_frozen = False
        self.is_dead = False

    @property
    def whole(self) -> Process:
        """The process that a thread belongs to."""
        return self.parent or self

    @property
    def can_run(self) -> bool:
        """Whether it has something to do, and may."""
        whole = self.whole
        return bool(self.ready) and not whole.is_frozen and not whole.is_dead

    def context(self) -> Context:
        """A context in which everything belongs to this process."""
        context = copy_context()
        context.run(PROCESS.set, self)
        return context


OUTSIDE = Process("outside")
PROCESS: ContextVar[Process] = ContextVar("PROCESS", default=OUTSIDE)


class Loop(asyncio.BaseEventLoop):
    """The loop that all processes of a simulation run on."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, chance: Random) -> None:
        super().__init__()
        self._chance = chance
        self._now = 0.0
        self._processes: list[Process] = [OUTSIDE]
        self._kept: list[asyncio.Task[Any]] = []
        self.turns = 0

    def time(self) -> float:
        """The virtual time, in seconds since the beginning."""
        return self._now

    def add(self, process: Process) -> None:
        """A process begins."""
        self._processes.append(process)

    def kill(self, process: Process) -> None:
        """It does nothing more, not even a `finally`."""
        process.is_dead = True
        self._processes = [each for each in self._processes if not each.whole.is_dead]

    def spawn(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin a task of a process. It is kept: what a dead process has left must not be collected, and unwound."""
        task = self.create_task(coroutine, context=process.context())
        self._kept.append(task)
        return task

    def _call_soon(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._put(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """There are no threads: what runs on this loop for a thread hands over to its process."""
        context = copy_context() if context is None else context
        context.run(PROCESS.set, context.get(PROCESS, OUTSIDE).whole)
        return self.call_soon(callback, *args, context=context)

    def _put(self, handle: asyncio.Handle) -> None:
        context: Context = handle._context
        context.get(PROCESS, OUTSIDE).ready.append(handle)

    def _run_once(self) -> None:
        able = [each for each in self._processes if each.ready and each.can_run]
        if not able:
            able = self._advance()
        process = able[0] if len(able) == 1 else self._chance.choice(able)
        handle = process.ready.popleft()
        self.turns += 1
        if not handle.cancelled():
            handle._run()

    def _advance(self) -> list[Process]:
        """Let time go on until somebody can run."""
        while self._scheduled:
            timer = heapq.heappop(self._scheduled)
            timer._scheduled = False
            if timer.cancelled():
                self._timer_cancelled_count -= 1
                continue
            self._now = max(self._now, timer.when())
            self._put(timer)
            while self._scheduled and self._scheduled[0].when() <= self._now:
                due = heapq.heappop(self._scheduled)
                due._scheduled = False
                if due.cancelled():
                    self._timer_cancelled_count -= 1
                else:
                    self._put(due)
            if able := [process for process in self._processes if process.can_run]:
                return able
        raise Stuck(f"at {self._now:.3f} s nobody can go on")

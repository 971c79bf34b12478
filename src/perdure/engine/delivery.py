"""The order in which outcomes go to a workflow's code: the same on the first run and on every replay.

A workflow may have several tasks, and which of them goes on first can decide what the code does next (a race, a
shared list). So outcomes are delivered one at a time: when the run is at rest, the next one is handed over, and then
the run comes to rest again. The first run delivers in order of arrival, and each delivery draws the next position; a
replay delivers, of the outcomes that have been asked for, the recorded one with the lowest position. What was not
recorded waits until nothing that was recorded can be delivered: so its body doesn't start before the history is
served, and a step that is new in the code doesn't hang an old history.

A run is at rest when none of its tasks can go on by itself: each waits for a turn here, runs a step's body, or waits
for a future that isn't done. asyncio has no list of what is about to run, so rest is what still looks like rest after
a few turns of the loop: enough for the callbacks by which one future's end reaches a task through others (an event
that a callback sets, shield). One is enough where tasks only wait for the ends of other tasks, and a second one where
one of them was cancelled: it may wait here, or in a body, and wakes in the next turn. So our tasks tell of it
(`Task`); where somebody else's factory makes them, every turn is waited for twice. A gather of gathers, however deep,
is seen through.

Who is given a turn goes on within the look that found the rest (`give`), not one turn of the loop later: half of
what an order costs is the loop. What was to run already goes first: where the loop has anything else to run, or
doesn't tell, it must look like rest once more. Whoever has just got an outcome, and has the next one in the same
breath, while all others are at rest, gets it at once.

Whoever waits in perdure waits for a future that isn't done before the moment in which it goes on. So a cancellation by
a sibling takes as many turns of the loop whatever has come meanwhile. A timer that rings, say, is no outcome yet, and
leaves no trace: if it ended its future a turn before the task goes on, two that are cancelled in between would end in
one order on the first run, and in the other one on a replay, in which only one of them has rung.

A run with one task has nothing to order, and skips all that, unless something is to be delivered that no task waits
for (a cancellation, the end of a limit of time): that, too, has its place in the order.

A task may wait in a way that the run needn't be in memory for (`dormant`). When all of them do, directly or by
waiting for each other, and there is nothing to deliver, the run is told that it rests (`on_rest`), and may suspend.
It is told, too, when something changes after that (`on_move`): then it takes its worker's slot again, and where there
is none, nothing is delivered until there is (`go_on`). Thousands of tasks may wait so: nothing here looks at each of
them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, Final, TypeVar

from perdure.engine import foreign

_NO_TASKS: Final[set[asyncio.Task[Any]]] = set()
_NO_TURNS: Final[deque[Any]] = deque()
_QUIET_TURNS = 4
_MANY = 8

T = TypeVar("T")


def give(future: asyncio.Future[T], result: T) -> None:
    """Let who waits for that future go on in here, not a turn of the loop later; call it where no task runs.

    It is no class of our own with such a method: tasks wait in a cheaper way for what is a plain future.
    """
    if future.done():
        return  # who waited was cancelled
    waiting: list[tuple[Callable[[asyncio.Future[T]], object], Context]]
    waiting = list(getattr(future, "_callbacks", None) or ())
    for callback, _ in waiting:
        future.remove_done_callback(callback)
    future.set_result(result)
    for callback, context in waiting:
        context.run(callback, future)


class Task(asyncio.Task[Any]):
    """A task of workflow code, which tells its run when it is cancelled."""

    __slots__ = ("delivery",)
    delivery: Delivery | None

    def cancel(self, msg: Any = None) -> bool:
        delivery: Delivery | None = getattr(self, "delivery", None)
        if delivery is not None:
            delivery.cancelling(self)
        return super().cancel(msg)


class Delivery:
    """Hands out turns to the tasks of one run."""

    __slots__ = (
        "_arrived",
        "_awake",
        "_beginning",
        "_dormant",
        "_going_on",
        "_held",
        "_loop",
        "_on_move",
        "_on_rest",
        "_order",
        "_peak",
        "_quiet",
        "_ready",
        "_recorded",
        "_resting",
        "_roused",
        "_scheduled",
        "_silent",
        "_unsure",
        "_waits",
        "position",
        "tasks",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        position: int,
        on_rest: Callable[[], None],
        on_move: Callable[[], bool],
    ) -> None:
        self.position = position
        """The highest position so far."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """All tasks of the run that haven't ended."""
        self._awake: set[asyncio.Task[Any]] = set()  # those that run code of the workflow, not waiting here
        self._peak = 0  # how many those were
        # What most runs have none of is made when it is needed: a worker makes thousands of these a second.
        self._dormant: set[asyncio.Task[Any]] = _NO_TASKS
        self._roused: set[asyncio.Task[Any]] = _NO_TASKS  # dormant ones that are about to go on
        self._resting = False  # the run has been told that it rests
        self._waits: dict[asyncio.Task[Any], tuple[asyncio.Future[Any], bool]] = {}
        """What tasks that are awake wait for, and whether that ends with other tasks."""
        self._loop = loop
        self._ready: Sized | None = getattr(loop, "_ready", None)  # what asyncio's own loops run in their next turn
        self._on_rest = on_rest
        self._on_move = on_move
        self._recorded: list[tuple[int, int, asyncio.Future[int]]] = []
        self._order = 0
        self._arrived: deque[tuple[float, asyncio.Future[int]]] = _NO_TURNS  # by time
        self._beginning: deque[asyncio.Future[int]] = _NO_TURNS  # what waits until nothing recorded is left
        self._quiet = 0
        self._held = False
        self._scheduled = False
        self._going_on: asyncio.Task[Any] | None = None  # who got an outcome, and has run since without a break
        self._silent = 0  # tasks that don't tell when they are cancelled
        self._unsure = False  # one has told it since the last delivery

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """One more task belongs to the run."""
        self.tasks.add(task)
        self._awake.add(task)
        if isinstance(task, Task):
            task.delivery = self
        else:
            self._silent += 1
        self._peak = max(self._peak, len(self._awake))

    def next(self) -> int:
        """Draw a position for an outcome that the code gets in this moment."""
        self.position += 1
        return self.position

    def leave(self) -> asyncio.Task[Any] | None:
        """The current task stops running workflow code: it runs a body, or waits."""
        task = asyncio.current_task(self._loop)
        if task is None or task not in self._awake:
            return None
        self._awake.discard(task)
        return task

    def enter(self, task: asyncio.Task[Any] | None) -> None:
        """That task runs workflow code again."""
        if task is not None and not task.done():
            self._awake.add(task)

    @property
    def is_simple(self) -> bool:
        """Whether there is nothing to order, and nothing that was delivered just now is still to be heard."""
        return len(self.tasks) == 1 and not (self._scheduled or self._recorded or self._arrived or self._beginning)

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._arrived or self._recorded or self._beginning)

    @property
    def has_recorded(self) -> bool:
        """Whether something recorded waits for its turn."""
        return bool(self._recorded)

    @property
    def awake(self) -> frozenset[asyncio.Task[Any]]:
        """The tasks that run code of the workflow: at rest, they wait for something that isn't of perdure."""
        return frozenset(self._awake)

    @property
    def is_busy(self) -> bool:
        """Whether a task runs a step, or waits until something is durable."""
        return len(self.tasks) != len(self._awake) + len(self._dormant)

    @property
    def is_moving(self) -> bool:
        """Whether it isn't known yet to be at rest, or has something to deliver."""
        return self._scheduled or bool(self._roused)

    @property
    def is_resting(self) -> bool:
        """Whether it was told that it rests, and none of its tasks has anything to go on with since."""
        return self._resting and self._turns_to_rest() == 1

    @contextmanager
    def dormant(self) -> Generator[None]:
        """The current task waits, in the block, in a way that the run needn't be in memory for."""
        task = self.leave()
        if task is not None:
            if self._dormant is _NO_TASKS:
                self._dormant, self._roused = set(), set()
            self._dormant.add(task)
        self.look()
        try:
            yield
        finally:
            if task is not None:
                self._dormant.discard(task)
                self._roused.discard(task)
            self.enter(task)
            if self._resting:
                self.look()

    def rouse(self, task: asyncio.Task[Any] | None) -> None:
        """What that task waits for has come: it leaves its wait in the next turn."""
        if task in self._dormant:
            self._roused.add(task)

    async def turn(self, at: float | None = None) -> int:
        """Wait for the turn of an outcome that arrived at that time, by default now; returns its position."""
        if self.is_simple or (at is None and not self._recorded and self._may_go_on()):
            return self.next()
        return await self._wait(self.arrived(self._loop.time() if at is None else at))

    async def replay(self, position: int) -> None:
        """Wait for the turn of a recorded outcome."""
        if self.is_simple:
            return
        if not (self._recorded and self._recorded[0][0] < position) and self._may_go_on():
            return
        await self._wait(self.recorded(position))

    def arrived(self, at: float) -> asyncio.Future[int]:
        """The turn of an outcome that arrived at that time: it will hold its position."""
        turn: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        if self._arrived is _NO_TURNS:
            self._arrived = deque()
        place = len(self._arrived)
        while place and self._arrived[place - 1][0] > at:
            place -= 1
        self._arrived.insert(place, (at, turn))
        self.look()
        return turn

    def recorded(self, position: int) -> asyncio.Future[int]:
        """The turn of a recorded outcome."""
        turn: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        self._order += 1
        heappush(self._recorded, (position, self._order, turn))
        self.look()
        return turn

    async def live(self) -> None:
        """Wait until nothing recorded can be delivered any more: then a body may start."""
        if self.is_simple:
            return
        turn: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        if self._beginning is _NO_TURNS:
            self._beginning = deque()
        self._beginning.append(turn)
        self.look()
        await self._wait(turn)

    @contextmanager
    def held_turn(self) -> Generator[None]:
        """Whoever has the turn keeps it for a while: its outcome isn't certain yet (a commit)."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.look()

    async def _wait(self, turn: asyncio.Future[int]) -> int:
        task = self.leave()
        try:
            position = await turn
        except BaseException:
            self.enter(task)
            self.look()
            raise
        self.enter(task)  # and a look is under way: who delivers looks again
        self._going_on = task
        return position

    def _may_go_on(self) -> bool:
        """Whether the current task has the turn still, and nobody else has anything to do."""
        task = self._going_on
        return (
            task is not None
            and task is asyncio.current_task(self._loop)
            and not self._held
            and self._turns_to_rest(task) == 1
        )

    def release(self, task: asyncio.Task[Any]) -> None:
        """A task of the run has ended."""
        self.tasks.discard(task)
        if isinstance(task, Task):
            task.delivery = None
        else:
            self._silent -= 1
        self._awake.discard(task)
        self._waits.pop(task, None)
        self.look()

    def look(self) -> None:
        """Something has changed: see whether the run comes to rest."""
        self._quiet = 0
        if self._resting:
            self._resting = False
            if not self._on_move():
                self._scheduled = True  # as soon as it may go on
        if not self._scheduled and (self._is_waited_for or self._dormant):
            self._scheduled = True
            self._loop.call_soon(self._look)

    def go_on(self) -> None:
        """It may go on now; when it moved, `on_move` had said no."""
        self._loop.call_soon(self._look)

    def cancelling(self, task: asyncio.Task[Any]) -> None:
        """One of its tasks is being cancelled."""
        self._unsure = True
        self.rouse(task)
        self.look()

    def close(self) -> None:
        """The run is over: whoever owns it isn't referred to from here any more."""
        self._on_rest, self._on_move = _nothing, _freely

    def _look(self) -> None:
        self._scheduled = False
        self._going_on = None
        is_waited_for = self._is_waited_for
        if self._held or not (is_waited_for or self._dormant):
            return
        turns = self._turns_to_rest()
        self._quiet = self._quiet + 1 if turns else 0
        if turns and self._quiet >= turns + bool(self._ready is None or self._ready):
            if not is_waited_for:
                self._resting = True
                self._on_rest()
                return
            self._scheduled = True
            try:
                self._deliver()
            finally:
                self._going_on = None
                self._loop.call_soon(self._look)  # when the end of whoever got it, if it was that, has been heard
            return
        self._scheduled = True
        self._loop.call_soon(self._look)

    def _turns_to_rest(self, running: asyncio.Task[Any] | None = None) -> int:
        """For how many turns it must look like rest; 0: it doesn't, somebody is about to go on, besides that task."""
        turns = 2 if self._unsure or self._silent else 1
        future: asyncio.Future[Any] | None
        if self._roused:
            return 0
        for task in self._dormant if self._silent else ():
            future = getattr(task, "_fut_waiter", None)
            if future is None or future.done():
                return 0  # cancelled, perhaps
        for task in self._awake:
            future = getattr(task, "_fut_waiter", None)
            if future is None or future.done():
                if task is running:
                    continue
                return 0
            known = self._waits.get(task)
            if known is None or known[0] is not future:
                # What it waits for may have ended before (a gather of tasks that are done): then it hears in one turn.
                self._waits[task] = (future, foreign.ends_with_tasks(task, future))
                return 0
            if not known[1]:
                if foreign.is_about_to_end(future):
                    return 0
                turns = _QUIET_TURNS
        return turns

    def _deliver(self) -> None:
        """Give one turn, and let who gets it run; who no longer waits (its task was cancelled) is passed over."""
        self._quiet = 0
        self._unsure = False
        if self._peak > _MANY * (len(self._awake) + 1):  # a set that was large takes as long to walk as it did then
            self._awake, self._peak = set(self._awake), len(self._awake)
        while self._recorded:
            position, _, turn = heappop(self._recorded)
            if not turn.done():
                give(turn, position)
                return
        while self._arrived:
            _, turn = self._arrived.popleft()
            if not turn.done():
                give(turn, self.next())
                return
        while self._beginning:
            turn = self._beginning.popleft()
            if not turn.done():
                give(turn, 0)
                return


def _nothing() -> None:
    pass


def _freely() -> bool:
    return True

"""A run that leaves memory, or is lost, is unwound: its code ends there, whatever it does about that, and nothing of it
is recorded. The next run replays to where it stood."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import A_WHILE, AT_ONCE, SOON, Gate, dozing
from perdure import App, now, run_step, sleep, step, telemetry, timeout, uuid4

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]
WAYS = ["suspended", "handed over", "lost"]


class Undoing:
    """A step that counts its bodies."""

    def __init__(self) -> None:
        self.bodies: list[str] = []

        @step
        async def undo(what: str = "") -> str:
            self.bodies.append(what)
            return what

        self.undo = undo


@pytest.fixture(autouse=True)
def nothing_is_left_unsaid(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio complains of exceptions that nobody retrieved, and of forgotten tasks: an unwound run leaves none."""
    yield
    gc.collect()
    complaints = [
        record.getMessage()
        for record in caplog.records
        if record.name == "asyncio" and record.levelno >= logging.WARNING and "took" not in record.getMessage()
    ]
    assert complaints == []


class Interruptions:
    """Ends a workflow's first run, one way or the other: `wait()` is where the code stands then."""

    def __init__(self, app: App, sql: Sql, events: Any, clock: Any, how: str) -> None:
        self.how = how
        self._app = app
        self._sql = sql
        self._events = events
        self._clock = clock
        self._gate = Gate()

        @step
        async def stand() -> None:
            await self._gate.passed()

        self._stand = stand

    async def wait(self) -> None:
        """To be awaited in a workflow."""
        if self.how == "suspended":
            await sleep(A_WHILE)
        else:
            await self._stand()

    async def result(self, invocation: Any) -> Any:
        """Its result, after its first run was unwound."""
        app, gate = self._app, self._gate
        if self.how == "suspended":
            async with dozing(app):
                handle = await app.start(invocation)
                await self._events.wait_for(telemetry.WorkflowSuspended)
                result = await handle.result(timeout=SOON)
        elif self.how == "handed over":
            async with app.worker(grace=AT_ONCE):
                handle = await app.start(invocation)
                await gate.reached()
            gate.open()
            async with app.worker():
                result = await handle.result(timeout=SOON)
        else:
            async with app.worker(lease=timedelta(seconds=4)):
                handle = await app.start(invocation)
                await gate.reached()
                self._clock.advance(60)
                await self._events.wait_for(telemetry.RunAbandoned)
                gate.open()
                result = await handle.result(timeout=SOON)
        ((epoch,),) = self._sql("SELECT epoch FROM workflows WHERE id = %s", handle.id)
        assert epoch > 1
        foreign = self._sql(
            "SELECT key, epoch FROM checkpoints WHERE workflow_id = %s AND epoch = 1 AND key LIKE '%%undo%%'", handle.id
        )
        assert foreign == [], "the run that was unwound has recorded something"
        return result


@pytest.fixture(params=WAYS)
def run_ends(request: pytest.FixtureRequest, app: App, sql: Sql, events: Any, clock: Any) -> Interruptions:
    return Interruptions(app, sql, events, clock, request.param)


async def test_finally_runs_each_time_and_its_step_once(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    plain: list[int] = []

    @app.workflow
    async def flow() -> str:
        try:
            await run_ends.wait()
            return "done"
        finally:
            plain.append(1)
            await undoing.undo()

    assert await run_ends.result(flow()) == "done"
    assert len(plain) == 2
    assert undoing.bodies == [""]


async def test_context_managers_are_left_and_their_steps_do_not_run(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    left: list[str] = []

    @contextmanager
    def plain() -> Iterator[None]:
        try:
            yield
        finally:
            left.append("plain")

    @asynccontextmanager
    async def with_a_step() -> AsyncIterator[None]:
        try:
            yield
        finally:
            left.append("with a step")
            await undoing.undo()

    @app.workflow
    async def flow() -> str:
        with plain():
            async with with_a_step():
                await run_ends.wait()
        return "done"

    assert await run_ends.result(flow()) == "done"
    assert left == ["with a step", "plain"] * 2
    assert undoing.bodies == [""]


@pytest.mark.parametrize("caught", [BaseException, Exception, asyncio.CancelledError], ids=lambda cls: cls.__name__)
async def test_what_the_code_does_about_it_does_not_happen(
    app: App, run_ends: Interruptions, caught: type[BaseException]
) -> None:
    """Whatever it catches: no step runs in its `except`, and what it returns is not the result."""
    undoing = Undoing()
    outcomes: list[str] = []

    @app.workflow
    async def flow() -> str:
        try:
            await run_ends.wait()
        except caught:
            outcomes.append("caught")
            await undoing.undo()
            return "compensated"
        return "done"

    assert await run_ends.result(flow()) == "done"
    assert undoing.bodies == []
    assert len(outcomes) == (0 if caught is Exception else 1)


async def test_code_that_suppresses_it_comes_to_nothing_at_its_next_call(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    reached: list[str] = []

    @app.workflow
    async def flow() -> str:
        with suppress(BaseException):
            await run_ends.wait()
        reached.append("after it")
        with suppress(BaseException):
            await undoing.undo("first")
        with suppress(BaseException):
            now()
        with suppress(BaseException):
            uuid4()
        with suppress(BaseException):
            await sleep(timedelta(0))
        with suppress(BaseException):
            await run_step("undo more", lambda: undoing.bodies.append("second"))
        with suppress(BaseException):
            async with timeout(HOUR):
                reached.append("inside a limit")
        return "done"

    assert await run_ends.result(flow()) == "done"
    assert undoing.bodies == ["first", "second"], "only in the run that counts"
    assert reached == ["after it", "after it", "inside a limit"]


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_task_that_swallows_its_cancellation_a_few_times_ends_in_the_end(
    app: App, run_ends: Interruptions, events: Any, times: int
) -> None:
    undoing = Undoing()
    swallowed: list[int] = []

    @app.workflow
    async def flow() -> str:
        left = times
        waiting = asyncio.ensure_future(run_ends.wait())
        while left and not waiting.done():
            try:
                await asyncio.wait([waiting])
            except asyncio.CancelledError:
                left -= 1
                swallowed.append(1)
        await undoing.undo()
        return "done"

    assert await run_ends.result(flow()) == "done"
    assert undoing.bodies == [""]
    assert events.of(telemetry.RunOutlived) == []


async def test_a_task_that_swallows_every_cancellation_is_left_alone_and_reported_once(
    app: App, sql: Sql, events: Any
) -> None:
    stuck = asyncio.Event()
    gave_in: list[bool] = []

    async def stubborn() -> None:
        while not stuck.is_set():
            with suppress(BaseException):
                await stuck.wait()
        gave_in.append(True)

    @app.workflow
    async def flow() -> str:
        task = asyncio.create_task(stubborn(), name="stubborn")
        await sleep(A_WHILE)
        stuck.set()
        await task
        return "done"

    async with dozing(app):
        handle = await app.start(flow())
        outlived = await events.wait_for(telemetry.RunOutlived)
        assert (outlived.workflow_id, outlived.task) == (handle.id, "stubborn")
        assert await handle.result(timeout=SOON) == "done"
        assert len(events.of(telemetry.RunOutlived)) == 1
    assert gave_in == [True, True]


async def test_a_workflow_that_swallows_every_cancellation_gives_its_slot_back(app: App, events: Any) -> None:
    release = asyncio.Event()

    @app.workflow
    async def stubborn() -> str:
        nap = asyncio.ensure_future(sleep(HOUR))
        while not release.is_set():
            with suppress(BaseException):
                await asyncio.wait([nap]) if not nap.done() else await release.wait()
        return "done"

    @app.workflow
    async def other() -> str:
        return "other"

    async with app.worker(concurrency=1):
        await app.start(stubborn())
        await events.wait_for(telemetry.WorkflowSuspended)
        waiting = await app.start(other())
        await events.wait_for(telemetry.RunOutlived)
        assert await waiting.result(timeout=SOON) == "other"
        release.set()


async def test_a_task_group_is_unwound_with_all_its_tasks(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    ended: list[str] = []

    async def one(name: str) -> str:
        try:
            await run_ends.wait()
            return name
        finally:
            ended.append(name)
            await undoing.undo(name)

    @app.workflow
    async def flow() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(name)) for name in "abc"]
        return [task.result() for task in tasks]

    assert await run_ends.result(flow()) == ["a", "b", "c"]
    assert sorted(ended) == sorted("aabbcc")
    assert sorted(undoing.bodies) == ["a", "b", "c"]


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_gathered_tasks_are_unwound(app: App, run_ends: Interruptions, return_exceptions: bool) -> None:
    undoing = Undoing()

    async def one(name: str) -> str:
        try:
            await run_ends.wait()
            return name
        finally:
            await undoing.undo(name)

    @app.workflow
    async def flow() -> list[str]:
        found = await asyncio.gather(*(one(name) for name in "abc"), return_exceptions=return_exceptions)
        await undoing.undo("after")
        return [str(each) for each in found]

    assert await run_ends.result(flow()) == ["a", "b", "c"]
    assert sorted(undoing.bodies) == ["a", "after", "b", "c"]


async def test_a_task_that_nobody_waits_for_is_unwound(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    ended: list[str] = []

    async def background() -> None:
        try:
            await sleep(HOUR)
        finally:
            ended.append("background")
            await undoing.undo("background")

    @app.workflow
    async def flow() -> str:
        task = asyncio.create_task(background())
        await run_ends.wait()
        return f"done, and the task is {'done' if task.done() else 'not done'}"

    assert await run_ends.result(flow()) == "done, and the task is not done"
    assert ended == ["background", "background"], "when the first run was unwound, and when its workflow had ended"
    assert undoing.bodies == []


async def test_a_task_that_outlives_its_workflow_records_nothing_and_changes_nothing(app: App, sql: Sql) -> None:
    gate = Gate()
    seen: list[str] = []
    undoing = Undoing()

    @step
    async def slow() -> None:
        try:
            await gate.passed()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def background() -> None:
        with suppress(BaseException):
            await slow()
        with suppress(BaseException):
            await undoing.undo()
        raise ValueError("of no interest to anybody")

    @app.workflow
    async def flow() -> str:
        task = asyncio.create_task(background())
        while not gate.arrivals:
            await sleep(timedelta(milliseconds=1))
        return f"{task.done()}"

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result(timeout=SOON) == "False"
    assert seen == ["cancelled"]
    assert undoing.bodies == []
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'step'") == [(0,)]


async def test_a_task_that_had_failed_already_is_waited_for_by_the_next_run(app: App, run_ends: Interruptions) -> None:
    async def fails() -> None:
        raise ValueError("early")

    @app.workflow
    async def flow() -> str:
        task = asyncio.create_task(fails())
        await run_ends.wait()
        try:
            await task
        except ValueError as error:
            return str(error)
        return "?"

    assert await run_ends.result(flow()) == "early"


async def test_a_chain_of_compensations_is_not_set_off(app: App, run_ends: Interruptions) -> None:
    """What sagas look like without a library: an unwound run must not book anything back."""
    undoing = Undoing()

    @step
    async def book(what: str) -> str:
        return what

    @app.workflow
    async def flow(*, fails: bool) -> str:
        booked: list[str] = []
        try:
            for what in ("flight", "hotel"):
                await book(what)
                booked.append(what)
                await run_ends.wait()
            if fails:
                raise ValueError("no car")
        except BaseException:
            for what in reversed(booked):
                await undoing.undo(what)
            return "booked back"
        return "booked"

    assert await run_ends.result(flow(fails=False)) == "booked"
    assert undoing.bodies == []


async def test_a_failure_after_a_suspension_is_compensated_once(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()

    @app.workflow
    async def flow() -> str:
        try:
            await run_ends.wait()
            raise ValueError("no car")
        except BaseException:
            await undoing.undo("flight")
            return "booked back"

    assert await run_ends.result(flow()) == "booked back"
    assert undoing.bodies == ["flight"]


async def test_errors_that_the_code_raises_while_it_is_unwound_are_thrown_away(
    app: App, run_ends: Interruptions, sql: Sql
) -> None:
    is_first = True

    @app.workflow
    async def flow() -> str:
        nonlocal is_first
        try:
            await run_ends.wait()
        finally:
            if is_first:
                is_first = False
                raise ValueError("while it was unwound")
        return "done"

    assert await run_ends.result(flow()) == "done"
    assert sql("SELECT count(*) FROM checkpoints WHERE status = 'error'") == [(0,)]


async def test_a_generator_that_was_not_finished_is_closed(app: App, run_ends: Interruptions) -> None:
    undoing = Undoing()
    closed: list[str] = []

    async def pages() -> AsyncIterator[int]:
        try:
            for number in range(3):
                await run_ends.wait()
                yield number
        finally:
            closed.append("closed")

    @app.workflow
    async def flow() -> list[int]:
        found = [number async for number in pages()]
        await undoing.undo()
        return found

    assert await run_ends.result(flow()) == [0, 1, 2]
    assert undoing.bodies == [""]
    assert len(closed) >= 2

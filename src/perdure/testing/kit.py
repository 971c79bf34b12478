"""The kit of a test: an app in a schema of its own, with a worker in this process and a clock that stands still."""

from __future__ import annotations

import asyncio
import json
import operator
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from typing_extensions import TypeVar

from perdure import gate
from perdure.app import App
from perdure.authoring.steps import Step
from perdure.authoring.workflows import Invocation
from perdure.errors import ReplayMismatch, UnknownWorkflow
from perdure.handle import Handle
from perdure.model.keys import RESULT
from perdure.model.records import Recorded
from perdure.model.replay import History, Replayed, Verdict
from perdure.model.unset import UNSET
from perdure.store.arrays import Texts
from perdure.testing import crashes, place
from perdure.testing.clock import PATIENCE, Clock
from perdure.testing.crashes import CrashReport, Drive, Same
from perdure.testing.fakes import Fake
from perdure.worker import Worker, WorkerOptions

R = TypeVar("R")

_MOST_MOVES = 2_000
_LOOK_SECONDS = 0.002
_FAR_OFF = 86_400.0


class Kit:
    """What a test has: `async with perdure_app(app) as kit: ...`.

    In the block the app's verbs work on the test's own schema, and a worker of this process runs what they start.

    Attributes:
        app: The app.
        clock: The database's clock, which stands still until `await clock.advance(...)`.
        database_url: The server; `using=` of transactional steps must lead there, too.
        schema: The schema of the test.
    """

    def __init__(
        self, app: App, *, database_url: str | None, schema: str | None, concurrency: int, lease: timedelta
    ) -> None:
        self.app = app
        self.database_url = database_url or ""
        self.schema = schema or place.new_schema()
        self._is_guest = schema is not None
        self._options = WorkerOptions(concurrency=concurrency, lease=lease, grace=timedelta(0), clock_stands_still=True)
        self._stack = AsyncExitStack()
        self._fakes: list[Fake] = []
        self._worker: Worker | None = None
        self.clock: Clock

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if not self.database_url:
                self.database_url = await asyncio.to_thread(place.server_url)
            if not self._is_guest:
                await place.sweep(self.database_url)
                stack.push_async_callback(place.drop, self.database_url, self.schema)
            settings = replace(
                self.app.settings, database_url=self.database_url, schema=self.schema, migrate=True, read_only=False
            )
            move_back = self.app.move(settings)
            stack.callback(move_back)
            stack.push_async_callback(_close, self.app)
            self.clock = Clock(self.app.session(), lambda: self._worker, self.idle)
            await self.clock.install()
            stack.callback(self._restore)  # once nothing runs any more
            await self.start_worker()
            stack.push_async_callback(self.stop_worker)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # --- the worker ------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        """The worker of this process.

        Raises:
            RuntimeError: There is none at the moment.
        """
        if self._worker is None:
            raise RuntimeError("this kit has no worker at the moment; use it in its block, after start_worker()")
        return self._worker

    async def start_worker(self) -> None:
        """Let a worker run here, as there is when the block begins."""
        if self._worker is None:
            program = replace(self.app.program, strict=True)
            worker = Worker(self.app.session(), program, self._options)
            await worker.start()
            self._worker = worker

    async def stop_worker(self) -> None:
        """Stop the worker in order: what runs is handed over, for `start_worker` to go on with."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()

    def crash(self) -> None:
        """Let go of all runs at once, as if the process had died: what isn't durable yet is lost.

        The worker takes them up again, from their last checkpoints.
        """
        self.worker.executor.abandon("the test crashed it")

    # --- waiting ---------------------------------------------------------------------------------------------------

    async def idle(self, *, timeout: timedelta = PATIENCE) -> None:
        """Wait until nothing can move before the clock does: no step runs, nothing is pending, nothing is due.

        Raises:
            TimeoutError: Something goes on; says what.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds()
        names = Texts(self.app.names)
        worker = self.worker
        while True:
            moving = "the worker is at work"
            if worker.is_at_rest:
                state = await self.clock.state(names)
                moving = ", ".join(
                    what for what in ("pending", "due", "orphaned", "maintenance") if getattr(state, what)
                )
                if moving == "pending" and worker.executor.free <= 0:
                    moving = ""  # what waits for the clock has all slots
                if not moving and state.wakes != worker.executor.seen:
                    moving = "a workflow hasn't seen yet what it was woken for"
                if not moving and worker.is_at_rest:
                    return
                if moving:
                    worker.look_around()
            if loop.time() > deadline:
                goes_on = "; ".join(worker.executor.busy) or moving
                raise TimeoutError(f"not idle within {timeout.total_seconds():g} s: {goes_on}")
            await asyncio.sleep(_LOOK_SECONDS)

    async def finish(self, handle: Handle[R], *, timeout: timedelta = PATIENCE) -> R:
        """The workflow's result; whenever all is idle, the clock is put forward to what is due next.

        Args:
            handle: Which.
            timeout: How long, really, each rest may take to come.

        Raises:
            TimeoutError: It waits for something that no clock brings, or doesn't come to rest, or goes on for ever;
                says what.
        """
        for _ in range(_MOST_MOVES):
            await self.idle(timeout=timeout)
            info = await handle.describe()
            if info.status.is_final:
                return await handle.result()
            due = await self.clock.next_due()
            if due is None:
                raise TimeoutError(
                    f"workflow {info.name!r} is {info.status.value}"
                    + (f", for {info.waiting_for}" if info.waiting_for else "")
                    + ", and nothing is due: give it what it waits for"
                )
            await self.clock.advance(due - await self.clock.now(), timeout=timeout)
        info = await handle.describe()
        raise TimeoutError(
            f"workflow {info.name!r} is still {info.status.value} at {await self.clock.now()}, after {_MOST_MOVES} "
            "moves of the clock; if it goes on for ever, use clock.advance()"
        )

    async def run(self, invocation: Invocation[R], /, **options: Any) -> R:
        """Start a workflow (`options` are those of `app.start`) and return its result: `finish` says how."""
        return await self.finish(await self.app.start(invocation, **options))

    # --- stand-ins, replay, crashes --------------------------------------------------------------------------------

    def fake(
        self,
        step: Step[..., Any],
        *,
        returns: Any = UNSET,
        raises: BaseException | type[BaseException] | None = None,
        calls: Callable[..., Any] | None = None,
    ) -> Fake:
        """Let a step do something else than its body, until the end of the kit's block (or of its own `with` block).

        Args:
            step: Which.
            returns: What it returns; by default None.
            raises: What it raises, each time.
            calls: What is called in its place, with its arguments; `def` or `async def`.
        """
        fake = Fake(step, returns=returns, raises=raises, calls=calls)
        self._fakes.append(fake)
        return fake

    async def replay(self, workflow: Handle[Any] | Mapping[str, Any]) -> Replayed:
        """Run today's code over what a workflow has recorded, without any effect.

        Args:
            workflow: Its handle; or what `app.export` gave, of any database: a recorded history as a regression test.

        Returns:
            How far it came, for what hasn't ended.

        Raises:
            ReplayMismatch: The code asks for something else, takes another path, or comes to another end.
            UnknownWorkflow: The app has no workflow of that name.
        """
        history = await self._history(workflow) if isinstance(workflow, Handle) else _imported(self.app, workflow)
        if history.name not in self.app.names:
            raise UnknownWorkflow(history.name, self.app.names)
        replays = gate.replays(self.app)
        with replays.installed():
            replayed = await replays.replay(history)
        if replayed.verdict is not Verdict.MATCHES:
            mismatch = ReplayMismatch(
                replayed.key or RESULT,
                replayed.recorded or "no end",
                replayed.asked or "nothing there",
                replayed.position,
                replayed.version,
                self.app.version,
            )
            mismatch.add_note(f"workflow {replayed.name!r}: {replayed.note}")
            raise mismatch
        return replayed

    async def _history(self, handle: Handle[Any]) -> History:
        (history,) = await gate.histories(self.app, [await handle.describe()])
        return history

    async def crash_everywhere(
        self,
        invocation: Invocation[Any],
        /,
        *,
        drive: Drive | None = None,
        same: Same = operator.eq,
        kill: bool = False,
        most: int = 500,
    ) -> CrashReport:
        """Run a workflow again and again, crash it at each of its durable boundaries, and see that its end is the same.

        Nothing else should run meanwhile. The workflow is started anew each time, and sleeps through as in `run`.

        Args:
            invocation: What to run.
            drive: What somebody does to it meanwhile, as an `async def` that gets its handle: cancel it, for instance.
            same: Whether two results are the same; for those that hold an id or a time.
            kill: Crash a worker process of its own, with SIGKILL, in place of the runs in this process. It imports the
                app, so the app must be the global of a module; stand-ins (`fake`) don't reach it.
            most: How many boundaries there may be.

        Returns:
            The boundaries, and the steps whose bodies ran twice without being declared idempotent.

        Raises:
            CrashFailure: After some crash it came to another end.
            TimeoutError: It doesn't come to an end; says what goes on.
        """
        return await crashes.explore(self, invocation, drive=drive, same=same, kill=kill, most=most)

    @property
    def lease(self) -> timedelta:
        """How long a worker may go unheard, by the test's clock."""
        return self._options.lease

    def _restore(self) -> None:
        for fake in reversed(self._fakes):
            fake.restore()


async def _close(app: App) -> None:
    """Close what the app has opened in the test, on whatever loop."""
    here = asyncio.get_running_loop()
    for loop, session in app.sessions():
        if loop is here:
            await session.close()
        elif loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(session.close(), loop))


def _imported(app: App, exported: Mapping[str, Any]) -> History:
    """A history out of what `app.export` gave. What waits in it waits on."""
    try:
        row: dict[str, Any] = exported["workflow"]
        recorded = [
            Recorded(
                key=each["key"],
                kind=each["kind"],
                position=each["position"],
                status=each["status"],
                payload=json.dumps(each["payload"], ensure_ascii=False),
                args_hash=each["args_hash"],
                attempts=each["attempts"],
                remaining=_FAR_OFF if each["wake_at"] else None,
                version=each["version"],
            )
            for each in exported["checkpoints"]
            if each["kind"] != "history"
        ]
        return gate.history_of(app, UUID(row["id"]), row["name"], recorded, None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"that is no exported workflow ({type(error).__name__}: {error}); give what app.export() gave"
        ) from error

"""What acceptance tests share: a gate in the way of a workflow, and a replay on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TypeVar

from perdure import App, Handle, Invocation, StepInfo, WorkflowInfo, step
from perdure.worker import Worker, WorkerOptions

R = TypeVar("R")

SOON = timedelta(seconds=30)
AT_ONCE = timedelta(0)
A_WHILE = timedelta(seconds=1.2)
"""A wait that leaves memory; with `dozing`, also where the machine stands still for a second."""


class Gate:
    """Where a step stands until the test lets it through."""

    def __init__(self) -> None:
        self.arrivals = 0
        self._reached = asyncio.Event()
        self._open = asyncio.Event()

    async def passed(self) -> None:
        self.arrivals += 1
        self._reached.set()
        await self._open.wait()

    async def reached(self, times: int = 1) -> None:
        async with asyncio.timeout(SOON.total_seconds()):
            while self.arrivals < times:
                self._reached.clear()
                await self._reached.wait()

    def open(self) -> None:
        self._open.set()


def dozing(app: App, **options: timedelta) -> AbstractAsyncContextManager[Worker]:
    """A worker whose workflows leave memory for all but the shortest waits."""
    return app._worker(WorkerOptions(suspends_from=timedelta(milliseconds=100), **options))


@step
async def hold(gate: Gate) -> None:
    await gate.passed()


@asynccontextmanager
async def interrupted(app: App, invocation: Invocation[R], gate: Gate) -> AsyncIterator[Handle[R]]:
    """Start it, and take its worker away while it stands at the gate; the block runs where nobody works on it."""
    async with app.worker(grace=AT_ONCE):
        handle = await app.start(invocation)
        await gate.reached()
    yield handle
    gate.open()


async def replayed(app: App, invocation: Invocation[R], gate: Gate) -> R:
    """Its result, from a second worker, which took it over from the first at the gate."""
    async with interrupted(app, invocation, gate) as handle:
        pass
    async with app.worker():
        return await handle.result(timeout=SOON)


async def served(app: App, handle: Handle[R]) -> R:
    """Its result, from a worker that runs until it is there."""
    async with app.worker():
        return await handle.result(timeout=SOON)


async def stopping(worker: Worker, handle: Handle[object]) -> asyncio.Task[None]:
    """Tell a worker to stop; returns when it has begun to, with the task that ends when it has."""
    task = asyncio.create_task(worker.stop())
    await handle.describe()  # a round trip to the database: many turns of the event loop
    assert not worker.is_ready
    assert not task.done()
    return task


async def only_step(handle: Handle[object]) -> StepInfo:
    (found,) = await handle.steps()
    return found


async def all_workflows(app: App) -> Sequence[WorkflowInfo]:
    return [each async for each in app.workflows()]

"""The processes of a seed: each has an app, and so a network, of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from itertools import count
from typing import Any

from perdure import App
from perdure.engine.leases import Lease
from perdure.session import Session
from perdure.worker import Worker, WorkerOptions
from simulation.loop import PROCESS, Loop, Process
from simulation.seen import LEASE
from simulation.server import Server


class SimulatedLease(Lease):
    """A lease whose thread is a process of the simulation."""

    async def start(self) -> None:
        own = Process(f"{PROCESS.get().whole.name}.lease", PROCESS.get().whole)
        loop = self._main
        assert isinstance(loop, Loop)
        loop.add(own)
        self._monotonic = loop.time
        self._task = loop.spawn(own, self._live())
        await self._first

    async def _live(self) -> None:
        failure: BaseException | None = None
        try:
            await self._keep()
        except BaseException as error:
            failure = error
        self._call(self._thread_ended, failure)

    async def end(self) -> None:
        if self._stop is not None and not self._task.done():
            self._stop.set()
            await self._ended


class Workers:
    """Those that run now, by their names."""

    def __init__(
        self,
        loop: Loop,
        server: Server,
        make_app: Callable[[str], App],
        resident: Callable[[App], Awaitable[None]],
        concurrency: int,
    ) -> None:
        self._loop = loop
        self._server = server
        self._make_app = make_app
        self._resident = resident
        self._concurrency = concurrency
        self._numbers = count(1)
        self._running: dict[str, tuple[Process, Worker]] = {}
        self._residents: list[asyncio.Future[None]] = []

    def __iter__(self) -> Iterator[tuple[Process, Worker]]:
        return iter(list(self._running.values()))

    @property
    def names(self) -> list[str]:
        """Those that run."""
        return sorted(self._running)

    def __getitem__(self, name: str) -> Process:
        return self._running[name][0]

    def process(self, kind: str) -> Process:
        """A process begins."""
        process = Process(f"{kind}{next(self._numbers)}")
        self._loop.add(process)
        return process

    def app(self, process: Process) -> App:
        """The app of a process, on the simulated network."""
        app = self._make_app(process.name)
        session = process.context().run(Session, app.settings, connect=self._server.connect)
        app._sessions[self._loop] = session
        return app

    def begin(self) -> None:
        """A worker process begins."""
        process = self.process("w")
        self._loop.spawn(process, self._work(process, self.app(process)))

    async def _work(self, process: Process, app: App) -> None:
        options = WorkerOptions(
            concurrency=self._concurrency,
            lease=timedelta(seconds=LEASE),
            grace=timedelta(seconds=1),
            suspends_from=timedelta(seconds=0.5),
        )
        worker = Worker(app.session(), app.program, options)
        self._running[process.name] = (process, worker)
        await worker.start()
        self._residents.append(asyncio.ensure_future(self._resident(app)))
        await worker.ended()

    def kill(self, name: str) -> None:
        """It does nothing more; the server notices."""
        process, _ = self._running.pop(name)
        self._loop.kill(process)
        self._server.client_died(process)

    def terminate(self, name: str) -> None:
        """It is told to stop, and does so in its own time."""
        process, worker = self._running.pop(name)
        self._loop.spawn(process, worker.stop())

    def failures(self) -> Iterator[BaseException]:
        """What the clients in worker processes have failed with."""
        for resident in self._residents:
            if resident.done() and not resident.cancelled():
                error: Any = resident.exception()
                if error is not None:
                    yield error

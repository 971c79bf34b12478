"""One seed: a few workers and a client on a simulated network, a storm of faults, and the books at the end."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psycopg

import perdure.worker
from perdure import App, starter, telemetry
from perdure.authoring import primitives
from perdure.engine import calls, run
from perdure.engine.watchdog import Watchdog
from perdure.model import ids
from perdure.store import database
from perdure.store.database import Database
from simulation.books import Books
from simulation.client import Client
from simulation.loop import PROCESS, Loop, Stuck
from simulation.rules import Rule
from simulation.seen import EPOCH_SECONDS, Seen
from simulation.server import STATEMENT, Server, severed
from simulation.storm import Storm
from simulation.workers import SimulatedLease, Workers
from simulation.world import Broken, declare

LIMIT_SECONDS = 180.0


async def _inline(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


async def _idle_watchdog(self: Watchdog) -> None:
    await asyncio.Event().wait()


class Seed:
    """One course of events."""

    concurrency = 10

    def __init__(self, number: int, url: str, *, without: Rule | None = None) -> None:
        self.number = number
        self._without = without
        chance = random.Random(f"client {number}")
        loop = self.loop = Loop(random.Random(f"turns {number}"))
        self.seen = Seen()
        self.books = Books(url, loop, self.seen)
        self._storm = Storm(number, loop, self.books, self.seen)
        self.server = Server(url, loop, random.Random(f"hints {number}"), self._storm.fate)
        self._workers = Workers(loop, self.server, self.app, self.resident, self.concurrency)
        self._client = Client(
            chance,
            self.books,
            self._workers.app,
            kill=lambda name: self._storm.kill(name, self._workers, self.server),
            lose_answer=self._storm.lose_answer,
            lose_flush=lambda name: self._storm.lose_flush(name, self._workers, self.server),
        )
        self._count = chance.choice((1, 2, 2, 3))

    def app(self, process: str) -> App:
        """The app of a process, with all that it declares."""
        return declare(self.books.world, process)

    async def resident(self, app: App) -> None:
        """What lives in a worker's process beside the worker."""
        await self._client.resident(app)

    def play(self) -> Seen:
        """Play it to its end.

        Raises:
            Broken: An invariant doesn't hold.
        """
        began = time.perf_counter()
        self.loop.set_exception_handler(self._on_error)
        with self._simulated():
            self.books.clean()
            for _ in range(self._count):
                self._workers.begin()
            try:
                self.loop.run_until_complete(self._all())
            except TimeoutError as error:
                raise Broken(f"not at its end after {LIMIT_SECONDS:g} s: {self.books.left()}") from error
            except Stuck as error:
                raise Broken(f"{error}: {self.books.left()}") from error
        self.server.close()
        for error in self._workers.failures():
            raise Broken(f"in a worker's process: {error!r}") from error
        self.books.close()
        self.seen.workflows = len(self.books.acknowledged)
        self.seen.runs = self.books.world.runs.total()
        self.seen.seconds = time.perf_counter() - began
        return self.seen

    async def _all(self) -> None:
        workers, server, storm = self._workers, self.server, self._storm
        raging = asyncio.ensure_future(storm.rage(workers, server))
        watching = asyncio.ensure_future(self.books.watch(lambda: workers))
        async with asyncio.timeout(LIMIT_SECONDS):
            process = workers.process("client")
            working = self.loop.spawn(process, self._client.work())
            if storm.loses_tail:
                await storm.lose_tail(process, server)
                working = self.loop.spawn(workers.process("client"), self._client.work())
            await working
            await raging
            await self.books.rest()
        watching.cancel()

    def _on_error(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Broken) or (error is not None and not isinstance(error, psycopg.Error)):
            self.books.world.complaints.append(f"{context.get('message')}: {error!r}")

    @contextmanager
    def _simulated(self) -> Iterator[None]:
        """Nothing below knows the real time, real chance, or threads."""
        chance = random.Random(f"engine {self.number}")
        seen, loop = self.seen, self.loop
        execute = Database.execute

        async def watched(self: Database, connection: Any, statement: Any, params: Sequence[object]) -> Any:
            who = PROCESS.get().name
            STATEMENT.set(statement.name)
            try:
                rows = await execute(self, connection, statement, params)
            except BaseException as error:
                seen.statements.append((loop.time(), who, statement.name, params, error))
                raise
            seen.statements.append((loop.time(), who, statement.name, params, rows))
            if statement.name == "notify":
                server.notified([str(each) for each in params[1]])
            return rows

        server = self.server
        random.seed(f"global {self.number}")
        patched: list[tuple[Any, str, Any]] = [
            (os, "urandom", chance.randbytes),
            (primitives, "randbits", chance.getrandbits),
            (ids, "time", SimpleNamespace(time_ns=lambda: int((EPOCH_SECONDS + loop.time()) * 1e9))),
            (run, "_CHANCE", random.Random(f"run {self.number}")),
            (calls, "_CHANCE", random.Random(f"calls {self.number}")),
            (perdure.worker, "Lease", SimulatedLease),
            (Watchdog, "run", _idle_watchdog),
            (asyncio, "to_thread", _inline),
            (database, "_sever", severed),
            (starter, "_LOCK_TIMEOUT", "0"),
            (Database, "execute", watched),
        ]
        former = [(where, name, getattr(where, name)) for where, name, _ in patched]
        for where, name, value in patched:
            setattr(where, name, value)
        if self._without is not None:

            def patch(where: Any, name: str, value: Any) -> None:
                former.append((where, name, getattr(where, name)) if hasattr(where, name) else (where, name, None))
                setattr(where, name, value)

            self._without.switch_off(patch)
        unsubscribe = telemetry.subscribe(
            lambda event: seen.events.append((loop.time(), PROCESS.get().whole.name, event))
        )
        try:
            yield
        finally:
            unsubscribe()
            for where, name, value in reversed(former):
                setattr(where, name, value)

"""One seed: a few workers and a client on a simulated network, a storm of faults, and the books at the end."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psycopg

import perdure.worker
from perdure import App, starter, telemetry
from perdure.authoring import primitives
from perdure.engine import bloat, calls, run
from perdure.engine.transactions import Transactions
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

    concurrency: int | None = None
    """How many workflows a worker may run at the same time; None: by chance."""

    def __init__(self, number: int, url: str, *, without: Rule | None = None) -> None:
        self.number = number
        self._without = without
        chance = random.Random(f"client {number}")
        loop = self.loop = Loop(random.Random(f"turns {number}"))
        self.seen = Seen()
        self.books = Books(url, loop, self.seen)
        self._storm = Storm(number, loop, self.books, self.seen)
        self.server = Server(url, loop, random.Random(f"hints {number}"), self._storm.fate)
        few = 10 if self._storm.is_calm else random.Random(f"limits {number}").choice((1, 2, 3, 10))
        self.books.world.concurrency = self.concurrency or few  # where it is calm, some must go on in time
        self._workers = Workers(loop, self.server, self.app, self.resident, self.books.world.concurrency)
        self._client = Client(
            chance,
            self.books,
            self._workers.app,
            self._storm,
        )
        self._storm.aim(self._workers, self.server)
        self._count = chance.choice((1, 2, 2, 3))

    def app(self, process: str) -> App:
        """The app of a process, with all that it declares."""
        return declare(self.books.world, process, self.server.session)

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
        self._check_transactions()
        self.books.close()
        self.seen.workflows = len(self.books.acknowledged)
        self.seen.runs = self.books.world.runs.total()
        self.seen.seconds = time.perf_counter() - began
        return self.seen

    def _check_transactions(self) -> None:
        notes = self.server.notes
        if ("held open", "") in notes:
            raise Broken("who does nothing any more held a transaction open for as long as a lease")
        if self.books.loses_tail or any(what == "late" for what, _ in notes):
            return  # nobody could know
        for _, _, event in self.seen.events:
            if isinstance(event, telemetry.RunAbandoned) and "is there already" in event.reason:
                raise Broken(f"{event.workflow_id} did again what was recorded, and could have known it")

    async def _all(self) -> None:
        workers, storm = self._workers, self._storm
        raging = asyncio.ensure_future(storm.rage())
        watching = asyncio.ensure_future(self.books.watch(lambda: workers))
        async with asyncio.timeout(LIMIT_SECONDS):
            process = workers.process("client")
            working = self.loop.spawn(process, self._client.work())
            if storm.loses_tail:
                await storm.lose_tail(process)
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

        async def noted(name: str, params: Sequence[object], rows: Awaitable[Any]) -> Any:
            who = PROCESS.get().name
            STATEMENT.set(name)
            try:
                found = await rows
            except BaseException as error:
                seen.statements.append((loop.time(), who, name, params, error))
                raise
            seen.statements.append((loop.time(), who, name, params, found))
            return found

        async def watched(self: Database, connection: Any, statement: Any, params: Sequence[object]) -> Any:
            rows = await noted(statement.name, params, execute(self, connection, statement, params))
            if statement.name == "notify":
                server.notified([str(each) for each in params[1]])
            return rows

        run_in_transaction = Transactions._run

        async def watched_in_transaction(self: Transactions, connection: Any, name: str, *params: object) -> Any:
            return await noted(name, params, run_in_transaction(self, connection, name, *params))

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
            # In every fourth seed all take the queue for full of dead rows, so that looks from its front are rare.
            (bloat, "_MANY", 0 if self.number % 4 == 3 else bloat._MANY),
            (bloat, "pause_after", lambda seconds: 2.0),
            (starter, "_LOCK_TIMEOUT", "0"),
            (Database, "execute", watched),
            (Transactions, "_run", watched_in_transaction),
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

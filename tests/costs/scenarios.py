"""What a workflow costs, counted: the same on each machine, and each time.

Worker and client run on the event loop of the simulation, with virtual time and no faults, on a real PostgreSQL. So
how much is gathered for a flush, and whose turn it is, depends on nothing but the seed. Counted are

- calls: of functions of perdure, and of all others (asyncio, psycopg, pydantic; those in C too), without those of the
  simulation itself;
- statements: each is a round trip and a commit of its own;
- rows that are inserted, updated and deleted, and bytes of the write-ahead log.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import perdure
from perdure import App, recv, sleep, step
from simulation.loop import PROCESS
from simulation.seed import Seed
from simulation.server import Fate

TESTS = str(Path(__file__).resolve().parents[1])
OWN = str(Path(perdure.__file__).parent)
_FEW, _MANY = 100, 300
"""Two sizes: their difference is what counts, without what a beginning and an end cost."""
_SETTLES_SECONDS = 1.0
_TRAVELS_SECONDS = 0.0005
_KEPT: list[Seed] = []  # what is collected would be unwound


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is done many times."""

    declare: Callable[[App], None]
    run: Callable[[App, int], Awaitable[None]]
    times: int = 1
    """How many of what is counted are in one."""


class Calls:
    """Counts calls."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._kinds: dict[str, str] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_call"):
            return
        file = frame.f_code.co_filename
        kind = self._kinds.get(file)
        if kind is None:
            kind = "" if file.startswith(TESTS) else "own" if file.startswith(OWN) else "others"
            self._kinds[file] = kind
        if kind:
            self.counts["calls of others" if event == "c_call" or kind == "others" else "own calls"] += 1


async def drained(app: App, count: int, name: str, *args: Any) -> None:
    """Start so many, and get all results."""
    known = app.workflow_functions[name]
    handles = await app.start_many([known(number, *args) for number in range(count)])
    await asyncio.gather(*(handle.result() for handle in handles))


def one_step(app: App) -> None:
    @step
    async def echo(number: int) -> int:
        return number

    @app.workflow
    async def one(number: int) -> int:
        return await echo(number)


def ten_steps(app: App) -> None:
    @step
    async def echo(number: int) -> int:
        return number

    @app.workflow
    async def ten(number: int) -> int:
        for _ in range(10):
            number = await echo(number)
        return number


def ten_tasks(app: App) -> None:
    @step
    async def echo(number: int) -> int:
        return number

    @app.workflow
    async def group(number: int) -> list[int]:
        return list(await asyncio.gather(*(echo(each) for each in range(10))))


def sleeper(app: App) -> None:
    @app.workflow
    async def sleeps(number: int) -> int:
        await sleep(timedelta(seconds=5))
        return number


def parent(app: App) -> None:
    @app.workflow
    async def leaf(number: int) -> int:
        return number

    @app.workflow
    async def family(number: int) -> int:
        return await leaf(number)


def listener(app: App) -> None:
    @app.workflow
    async def listens(number: int) -> int:
        return await recv("numbers", type=int)


async def told(app: App, count: int) -> None:
    """Each gets a message."""
    known = app.workflow_functions["listens"]
    handles = await app.start_many([known(number) for number in range(count)])
    await asyncio.gather(*(handle.send("numbers", 1) for handle in handles))
    await asyncio.gather(*(handle.result() for handle in handles))


async def started(app: App, count: int) -> None:
    """Each is started by itself, by 50 callers at a time."""
    known = app.workflow_functions["one"]
    left = iter(range(count))

    async def caller() -> list[Any]:
        return [await app.start(known(number)) for number in left]

    handles = [each for made in await asyncio.gather(*(caller() for _ in range(50))) for each in made]
    await asyncio.gather(*(handle.result() for handle in handles))


SCENARIOS = {
    "a workflow of one step": Scenario(one_step, lambda app, count: drained(app, count, "one")),
    "a workflow of one step, started by itself": Scenario(one_step, started),
    "a step of ten, one after the other": Scenario(ten_steps, lambda app, count: drained(app, count, "ten"), times=10),
    "a step of ten beside each other": Scenario(ten_tasks, lambda app, count: drained(app, count, "group"), times=10),
    "a workflow that leaves memory, and wakes": Scenario(sleeper, lambda app, count: drained(app, count, "sleeps")),
    "a workflow with a child": Scenario(parent, lambda app, count: drained(app, count, "family")),
    "a workflow that gets a message": Scenario(listener, told),
}


class NoChance(Random):
    """Where all is as always, a change of the code doesn't shift what was drawn behind it."""

    def random(self) -> float:
        return 0.5

    def choice(self, seq: Any) -> Any:
        return seq[0]


class Course(Seed):
    """One scenario in place of the seed's clients; one worker, and a network without moods."""

    concurrency = 100

    def __init__(self, scenario: Scenario, count: int, url: str) -> None:
        self._scenario = scenario
        self._times = count
        self.counts: Counter[str] = Counter()
        super().__init__(0, url)
        self._count = 1
        self.server.fates = lambda process, statement: Fate(_TRAVELS_SECONDS, 0.0, _TRAVELS_SECONDS)
        self.server._chance = self.loop._chance = NoChance()

    def app(self, process: str) -> App:
        app = App("costs", schema="perdure", database_url="host=/simulated", version="1")
        self._scenario.declare(app)
        return app

    async def resident(self, app: App) -> None:
        pass

    async def _all(self) -> None:
        process = self._workers.process("client")
        await self.loop.spawn(process, self._client_does())

    async def _client_does(self) -> None:
        app = self._workers.app(PROCESS.get())
        await self._scenario.run(app, 10)  # whatever happens once
        calls = Calls()
        await asyncio.sleep(_SETTLES_SECONDS)
        before, position = self._written(), len(self.seen.statements)
        gc.disable()
        sys.setprofile(calls)
        try:
            await self._scenario.run(app, self._times)
        finally:
            sys.setprofile(None)
        await asyncio.sleep(_SETTLES_SECONDS)
        after = self._written()
        self.counts = calls.counts
        self.counts["statements"] = len(self.seen.statements) - position
        self.counts.update({what: after[what] - before[what] for what in after})

    def _written(self) -> dict[str, int]:
        """Rows written, and bytes of the log, so far."""
        self.server.in_each("SELECT pg_stat_force_next_flush()")
        self.books.oracle.execute("SELECT pg_stat_force_next_flush()")
        row = self.books.oracle.execute(
            "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del)::int8 AS rows, "
            "(pg_current_wal_insert_lsn() - '0/0')::int8 AS wal FROM pg_stat_user_tables WHERE schemaname = 'perdure'"
        ).fetchone()
        assert row is not None
        return {"rows": row.rows, "bytes of log": row.wal}


def costs(scenario: Scenario, url: str) -> dict[str, float]:
    """What one more costs."""
    counted = []
    for count in (_FEW, _MANY):
        course = Course(scenario, count, url)
        _KEPT.append(course)
        course.play()
        counted.append(course.counts)
    few, many = counted
    return {
        what: round((many[what] - few[what]) / (_MANY - _FEW) / scenario.times, 3)
        for what in ("own calls", "calls of others", "statements", "rows", "bytes of log")
    }

"""More worker processes on one server: they must not get in each other's way, nor cost much while they are idle.

And neither must clients that wait for results.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from statistics import median
from uuid import UUID

from benchmarks.bench import Bench
from benchmarks.drain import drain
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, stand_still
from perdure import Client
from perdure.config import DATABASE_URL

WORKERS = (1, 2, 4, 8)
CONCURRENCY = 500
BACKLOG = 100_000
"""What the first second costs, connections and plans of so many workers, isn't a tenth of it."""
IDLE = 50
WAITING = 1_000
_CLIENTS = 10
_SETTLED_SECONDS = 35
_SECONDS = 20


def measure(bench: Bench) -> list[Figure | Curve]:
    """Backlogs with more and more workers, over and over; then those that do nothing."""
    rates: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(bench.repeats):
        for count, found in rates.items():
            found.append(drain(bench, [("worker", CONCURRENCY)] * count, backlog=BACKLOG).rate)
    best = max(median(found) for found in rates.values())
    many = WORKERS[-1]
    idle = bench.count(IDLE)
    return [
        *(Figure(name=f"{count} workers", unit="workflows/s", values=found) for count, found in rates.items()),
        Figure(name=f"{many} workers / the best", unit="times", values=[rate / best for rate in rates[many]],
               target=0.9),
        Figure(name=f"{idle} idle workers, server", unit="% of a core", values=[_idle(bench, idle)], target=5,
               better="less"),
        Figure(name=f"{bench.count(WAITING):,} who wait for results, server", unit="% of a core",
               values=[asyncio.run(_waiting(bench, bench.count(WAITING)))], target=5, better="less"),
        Curve(name="perdure", x=WORKERS, y=[median(found) for found in rates.values()],
              across="worker processes on one server", up="workflows/s"),
    ]  # fmt: skip


def _idle(bench: Bench, count: int) -> float:
    env = {DATABASE_URL: bench.cluster.url, SCHEMA: bench.fresh_schema()}
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(role("worker", 100, env=env))
        time.sleep(_SETTLED_SECONDS)
        return _server_percent(bench)


async def _waiting(bench: Bench, count: int) -> float:
    """All wait for workflows that nobody runs: by several clients, as there are several processes."""
    schema = bench.fresh_schema()
    async with Client(bench.cluster.url, schema=schema) as client:
        handles = await client.start_many(stand_still() for _ in range(count))
    ids = [handle.id for handle in handles]
    clients = [Client(bench.cluster.url, schema=schema) for _ in range(_CLIENTS)]
    waits = [asyncio.ensure_future(_wait(client, ids[number :: len(clients)])) for number, client in enumerate(clients)]
    await asyncio.sleep(_SETTLED_SECONDS)
    percent = await asyncio.to_thread(_server_percent, bench)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    return percent


async def _wait(client: Client, ids: list[UUID]) -> None:
    async with client:
        await asyncio.gather(*(client.handle(id).result() for id in ids))


def _server_percent(bench: Bench) -> float:
    before = bench.server_seconds()
    time.sleep(_SECONDS)
    return (bench.server_seconds() - before) / _SECONDS * 100

"""From a message in one process to the first step behind its `recv` in another, in a workflow that had left memory.

The step returns the machine's monotonic clock, which both processes share. Beside it, a start to its first step.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, listen, timed
from perdure import Client, Handle, Status
from perdure.config import DATABASE_URL

COUNT = 150
_WARM_UP = 10
_PAUSE_SECONDS = (0.02, 0.06)  # the worker is idle again, and not always at the same point of its poll


def measure(bench: Bench) -> list[Figure]:
    """In turn: a message, a start, a message, ..."""
    medians: list[float] = []
    tails: list[float] = []
    starts: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            messages, started = asyncio.run(_times(bench, schema))
        medians.append(statistics.median(messages))
        tails.append(statistics.quantiles(messages, n=100)[98])
        starts.append(statistics.median(started))
    return [
        Figure(name="start to first step, p50", unit="ms", values=starts, better="less"),
        Figure(name="message to the step behind recv, p50", unit="ms", values=medians, target=10, better="less"),
        Figure(name="message to the step behind recv, p99", unit="ms", values=tails, better="less"),
    ]


async def _times(bench: Bench, schema: str) -> tuple[list[float], list[float]]:
    messages: list[float] = []
    starts: list[float] = []
    async with Client(bench.cluster.url, schema=schema) as client:
        for _ in range(bench.count(COUNT) + _WARM_UP):
            handle: Handle[Any] = await client.start(listen())
            while await handle.status() is not Status.WAITING:
                await asyncio.sleep(0.005)
            await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))
            began = time.monotonic_ns()
            await handle.send("go", True)
            messages.append((await handle.result() - began) / 1e6)
            await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))
            began = time.monotonic_ns()
            other = await client.start(timed())
            starts.append((await other.result() - began) / 1e6)
    return messages[_WARM_UP:], starts[_WARM_UP:]

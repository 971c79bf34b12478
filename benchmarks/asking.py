"""From `handle.ask` in one process to the answer of a workflow in another, one question after the other."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, answers
from perdure import Client, Handle
from perdure.config import DATABASE_URL

COUNT = 150
_WARM_UP = 10
_PAUSE_SECONDS = (0.02, 0.06)


def measure(bench: Bench) -> list[Figure]:
    """Round trips to one workflow, one at a time."""
    medians: list[float] = []
    tails: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            times = asyncio.run(_times(bench, schema))
        medians.append(statistics.median(times))
        tails.append(statistics.quantiles(times, n=100)[98])
    return [
        Figure(name="ask to answer, p50", unit="ms", values=medians, target=15, better="less"),
        Figure(name="ask to answer, p99", unit="ms", values=tails, better="less"),
    ]


async def _times(bench: Bench, schema: str) -> list[float]:
    times: list[float] = []
    count = bench.count(COUNT) + _WARM_UP
    async with Client(bench.cluster.url, schema=schema) as client:
        handle: Handle[Any] = await client.start(answers(count))
        for number in range(count):
            await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))
            began = time.perf_counter()
            assert await handle.ask("number", number) == number
            times.append((time.perf_counter() - began) * 1e3)
        await handle.result()
    return times[_WARM_UP:]

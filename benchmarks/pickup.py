"""From a start in one process to the first step in another, whose worker has nothing else to do.

The step returns the machine's monotonic clock, which both processes share.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from uuid import uuid4

import psycopg

from benchmarks.bench import Bench
from benchmarks.figures import Curve, Figure, distribution
from benchmarks.processes import role
from benchmarks.program import SCHEMA, TEXT, timed
from perdure import Client
from perdure.config import DATABASE_URL

COUNT = 200
_PAUSE_SECONDS = (0.02, 0.06)  # the worker is idle again, and not always at the same point of its poll


def measure(bench: Bench) -> list[Figure | Curve]:
    """Start, wait for the result, pause."""
    medians: list[float] = []
    tails: list[float] = []
    inserts: list[float] = []
    all: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            times = asyncio.run(_times(bench, schema))
            inserts.append(statistics.median(asyncio.run(_inserts(bench, schema))))
        medians.append(statistics.median(times))
        tails.append(statistics.quantiles(times, n=100)[98])
        all += times
    return [
        Figure(name="start to first step, p50", unit="ms", values=medians, target=3, better="less"),
        Figure(name="one durable insert after such a pause, p50", unit="ms", values=inserts, better="less"),
        Figure(
            name="start to first step / insert",
            unit="times",
            better="less",
            values=[time / insert for time, insert in zip(medians, inserts, strict=True)],
        ),
        Figure(name="start to first step, p99", unit="ms", values=tails, target=15, better="less"),
        distribution("start to first step", all),
    ]


async def _times(bench: Bench, schema: str) -> list[float]:
    times: list[float] = []
    async with Client(bench.cluster.url, schema=schema) as client:
        for number in range(bench.count(COUNT) + 10):
            began = time.monotonic_ns()
            handle = await client.start(timed())
            step_began = await handle.result()
            if number >= 10:  # connections and statements are there
                times.append((step_began - began) / 1e6)
            await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))
    with bench.connect() as connection:
        ((ended,),) = connection.execute(f"SELECT count(*) FROM {schema}.workflows WHERE status = 'success'").fetchall()
        assert ended == len(times) + 10, f"{ended} workflows are recorded of {len(times) + 10}"
    return times


async def _inserts(bench: Bench, schema: str) -> list[float]:
    """What the machine takes when it is woken for one transaction: processes that sleep are slow to wake."""
    times: list[float] = []
    async with await psycopg.AsyncConnection.connect(bench.cluster.url, autocommit=True) as plain:
        plain.prepare_threshold = 0
        await plain.execute(f"CREATE TABLE {schema}.plain (id uuid PRIMARY KEY, payload json NOT NULL)")
        for _ in range(bench.count(COUNT)):
            began = time.perf_counter()
            await plain.execute(f"INSERT INTO {schema}.plain VALUES (%s, %s::json)", (uuid4(), f'"{TEXT}"'))
            times.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))
    return times
